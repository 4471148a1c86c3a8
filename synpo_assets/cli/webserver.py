"""Dagster's web server with the reports of the home beside the UI, to be read only: /reports/boosting_report.html.

`dg dev` starts the web server of Dagster as a process. `serve` has it start this module in its place, which is the same
server with one route more. Started in any other way, Dagster's own server answers; the report is then a file in the home.
"""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dagster._cli import dev
from dagster_dg_cli.cli import cli as dg
from dagster_webserver import cli
from dagster_webserver.app import create_app_from_workspace_process_context
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from synpo_assets.reports import FOLDER

open_ipc_subprocess = dev.open_ipc_subprocess


def serve(host: str, port: int) -> None:
    """Runs `dg dev` until it is interrupted."""
    dev.open_ipc_subprocess = _start
    dg(["dev", "--host", host, "--port", str(port)])


def _start(parts: Sequence[str], **kwargs: Any) -> subprocess.Popen[Any]:
    return open_ipc_subprocess([__name__ if part == "dagster_webserver" else part for part in parts], **kwargs)


def app_with_reports(*arguments: Any, **options: Any) -> Starlette:
    """The app of Dagster's UI, with the folder of reports."""
    app = create_app_from_workspace_process_context(*arguments, **options)
    folder = Path(os.environ["SYNPO_HOME"]) / FOLDER
    folder.mkdir(exist_ok=True)
    # Before the last route of the UI, which takes every address.
    app.router.routes.insert(0, Mount(f"/{FOLDER}", StaticFiles(directory=folder)))
    return app


if __name__ == "__main__":
    cli.create_app_from_workspace_process_context = app_with_reports
    cli.main()
