"""Dagster's web server with the reports of the home beside the UI, to be read only: /reports/boosting_report.html.

`dg dev` starts the web server of Dagster as a process. `serve` has it start this module in its place, which is the same
server with one route more. Started in any other way, Dagster's own server answers; the report is then a file in the home.

Dagster's server answers whoever asks. A web page that is open in the same browser could read the history, delete runs or launch
some, so requests that come from another site are refused here. So could whoever reaches the port: a token keeps them out.
"""

import hmac
import os
import secrets
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from dagster._cli import dev
from dagster._grpc import server as code_server
from dagster_dg_cli.cli import cli as dg
from dagster_webserver import cli
from dagster_webserver.app import create_app_from_workspace_process_context
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from resources.common.processes import UI_PROCESS, end_if_killed
from resources.settings.sections import SettingsError
from synpo_assets.reports import FOLDER

# The address that the server listens on, told to its process.
LISTENS_ON = "SYNPO_UI_HOST"
# The secret that it asks for, likewise; unset where it asks for none.
TOKEN = "SYNPO_UI_TOKEN"
LOOPBACK, ANY_ADDRESS = ("127.0.0.1", "localhost", "::1"), ("0.0.0.0", "::")

# Modules of Dagster; without one of these processes the UI ends, while a code server is started anew.
PARTS = {"dagster_webserver": "web server", "dagster._daemon": "daemon"}
UI_ENDS = "the UI ends, and the runs that it started with it. Finished work is kept: start `synpo ui` again."

NO_TOKEN = "This UI asks for its token: open the address that `synpo ui` printed."

open_ipc_subprocess, send_ipc_shutdown_message = dev.open_ipc_subprocess, dev.send_ipc_shutdown_message
is_ending = threading.Event()


def address(host: str, port: int, token: str | None) -> str:
    """What to open in a browser; the token in it becomes a cookie there."""
    return f"http://{host}:{port}" + (f"/?token={token}" if token else "")


def new_secret(host: str, token: bool) -> str | None:
    """The secret that whoever opens the UI has to know; None if only this machine can reach it and no token was asked for."""
    if host not in LOOPBACK and not token:
        raise SettingsError(
            f"With --host {host}, everybody who reaches the port could read this home and launch runs: add --token, or leave "
            "--host out and reach it through a tunnel (`ssh -L 3000:127.0.0.1:3000 machine`)."
        )
    return secrets.token_urlsafe(24) if token else None


def serve(host: str, port: int, token: str | None = None) -> None:
    """Runs `dg dev` until it is interrupted."""
    os.environ[LISTENS_ON] = host
    os.environ.pop(TOKEN, None)
    if token is not None:
        os.environ[TOKEN] = token
    os.environ[UI_PROCESS] = str(os.getpid())
    dev.open_ipc_subprocess = code_server.open_ipc_subprocess = _start
    dev.send_ipc_shutdown_message = _shut_down
    # A script that starts it in the background has SIGINT ignored, by which Dagster ends its processes, and they inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # A checkout says in its pyproject.toml what to load; an installed wheel has none.
    code = [] if Path("pyproject.toml").exists() else ["-m", "definitions"]
    dg(["dev", *code, "--host", host, "--port", str(port)])


def _start(parts: Sequence[str], **kwargs: Any) -> subprocess.Popen[Any]:
    """Starts web server, daemon or code server: `python -m MODULE ...`."""
    python, dash_m, module, *arguments = parts
    serving = __name__ if module == "dagster_webserver" else module
    process = open_ipc_subprocess([python, dash_m, "synpo_assets.cli.with_ui", serving, *arguments], **kwargs)
    if module in PARTS:
        # Dagster, which sees it after up to five seconds, would end the rest step by step, and what is at work last.
        end_if_killed(process.pid, f"The {PARTS[module]} of the UI", UI_ENDS, is_ending)
    return process


def _shut_down(w_fd: int) -> None:
    """Tells web server or daemon to end; Dagster kills one that has not after a minute."""
    is_ending.set()
    send_ipc_shutdown_message(w_fd)


def app_with_reports(*arguments: Any, **options: Any) -> Starlette:
    """The app of Dagster's UI, with the folder of reports."""
    app = create_app_from_workspace_process_context(*arguments, **options)
    folder = Path(os.environ["SYNPO_HOME"]) / FOLDER
    folder.mkdir(exist_ok=True)
    # Before the last route of the UI, which takes every address.
    app.router.routes.insert(0, Mount(f"/{FOLDER}", StaticFiles(directory=folder)))
    app.add_middleware(WithToken)
    app.add_middleware(SameSite)
    return app


class WithToken:
    """Where the server has a token, refuses whoever does not bring it: in the address the first time, then as a cookie."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request or a websocket, or refuses it."""
        token = os.environ.get(TOKEN)
        if token is None or scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        connection = HTTPConnection(scope)
        # The cookies of a host are those of all its ports.
        cookie = f"synpo_token_{connection.url.port or 80}"
        brought = parse_qs(connection.url.query).get("token", [""])[0]
        if hmac.compare_digest(connection.cookies.get(cookie, "").encode(), token.encode()):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": NO_TOKEN})
        elif hmac.compare_digest(brought.encode(), token.encode()):
            response = RedirectResponse(connection.url.path, 303)
            response.set_cookie(cookie, token, httponly=True, samesite="strict")
            await response(scope, receive, send)
        else:
            await PlainTextResponse(NO_TOKEN, 401)(scope, receive, send)


class SameSite:
    """Refuses what a page of another site may send: another host's name, another origin, and changes by GET."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request or a websocket, or refuses it."""
        problem = _foreign(scope) if scope["type"] in ("http", "websocket") else None
        if problem is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": problem})
        else:
            await PlainTextResponse(problem, 403)(scope, receive, send)


def _foreign(scope: Scope) -> str | None:
    headers, listens_on = Headers(scope=scope), os.environ.get(LISTENS_ON, LOOPBACK[0])
    try:
        asked, origin = urlsplit(f"//{headers.get('host', '')}"), urlsplit(headers.get("origin", ""))
    except ValueError:
        return "The Host or Origin of this request is no address."
    # Who listens on all addresses is reached under names that are not known here.
    if asked.hostname not in (*LOOPBACK, listens_on) and listens_on not in ANY_ADDRESS:
        return f"This UI answers at {listens_on} alone: start it with --host to reach it under another name."
    if "origin" in headers and origin.netloc != asked.netloc:
        return "Requests of other sites are refused."
    # Everything that the pages ask is sent by POST; an address can be opened by any page. Names in it may be encoded in many ways.
    if scope.get("method") in ("GET", "HEAD") and scope["path"].endswith("/graphql") and scope["query_string"]:
        return "Send queries by POST."
    return None


if __name__ == "__main__":
    cli.create_app_from_workspace_process_context = app_with_reports
    cli.main()
