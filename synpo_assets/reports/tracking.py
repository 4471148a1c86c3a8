"""The iterations of a home as one run of a tracker, with a row for each, so that homes are compared where runs are."""

import contextlib
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from resources.settings.settings import Settings
from resources.storage.files import json_sha256, write_atomically
from resources.training.live import PROJECT
from synpo_assets.graph.metrics import Metric
from synpo_assets.reports.finished import FinishedIteration

# Beside the report: the name of the run, and the hash of each row that the tracker has.
RECORD = "tracked.json"
Rows = Mapping[int, Mapping[str, float]]


class _Record(BaseModel):
    run: str
    rows: dict[str, str] = {}


def track(home: Path, settings: Settings, iterations: Sequence[FinishedIteration], report: Path) -> str | None:
    """Hands the rows that are new or have changed to the tracker of the settings; the name of the run, None without one."""
    report_to = settings.training_processes.report_to
    if report_to == "none":
        return None
    file = report.with_name(RECORD)
    # With a part that is drawn at random: homes of two projects may have one name.
    record = _Record(run=f"{home.name}-{uuid.uuid4().hex[:6]}")
    # What was damaged is begun anew.
    with contextlib.suppress(OSError, ValidationError):
        record = _Record.model_validate_json(file.read_bytes())
    rows = {int(iteration.key): row_of(iteration) for iteration in iterations}
    changed = {number: row for number, row in rows.items() if record.rows.get(str(number)) != json_sha256(row)}
    if changed:
        TRACKERS[report_to](record.run, settings.model_dump(mode="json", exclude={"storage"}), changed, report)
        record.rows |= {str(number): json_sha256(row) for number, row in changed.items()}
        write_atomically(file, record.model_dump_json(indent=1).encode())
    return record.run


def row_of(iteration: FinishedIteration) -> dict[str, float]:
    """What was measured in an iteration, by names that every tracker takes; of held-out prompts, those of test."""
    frame = iteration.metrics.frame
    measured = zip(frame["asset"], (Metric(**row) for row in frame.drop("asset", "iteration").to_dicts()), strict=True)
    return {
        re.sub(r"[^\w .:/-]", "", f"{asset}/{metric.label}"): metric.value
        for asset, metric in measured
        if metric.value is not None and metric.split != "dev"
    }


def _trackio(name: str, settings: dict[str, Any], rows: Rows, report: Path) -> None:
    import trackio

    trackio.init(PROJECT, name, config=settings, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False)
    for number, row in rows.items():
        trackio.log(dict(row), step=number)
    trackio.log_artifact(report, name=f"{name}-report", type="report")
    trackio.finish()


def _wandb(name: str, settings: dict[str, Any], rows: Rows, report: Path) -> None:
    import wandb

    with wandb.init(project=PROJECT, name=name, id=name, resume="allow", config=settings) as run:
        # An iteration may be made again, and a step of W&B cannot be.
        run.define_metric("*", step_metric="iteration")
        for number, row in rows.items():
            run.log({"iteration": number, **row})
        run.log({"report": wandb.Html(report.read_text(), inject=False)})


def _mlflow(name: str, settings: dict[str, Any], rows: Rows, report: Path) -> None:
    import mlflow

    mlflow.set_experiment(PROJECT)
    found = mlflow.search_runs(
        [], filter_string=f"attributes.run_name = '{name}'", search_all_experiments=True, output_format="list"
    )
    with mlflow.start_run(run_id=found[0].info.run_id if found else None, run_name=name):
        # Parameters of MLflow cannot be changed, and settings can.
        mlflow.log_dict(settings, "settings.yaml")
        for number, row in rows.items():
            mlflow.log_metrics(dict(row), step=number)
        mlflow.log_artifact(str(report))


TRACKERS: dict[str, Callable[[str, dict[str, Any], Rows, Path], None]] = {
    "trackio": _trackio, "wandb": _wandb, "mlflow": _mlflow,
}  # fmt: skip
