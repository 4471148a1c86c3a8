"""What an asset shows about itself in the UI, and the content version that staleness is judged by."""

import hashlib
from typing import Any

import dagster as dg
import polars as pl

from resources.checkpoint_store import Checkpoint
from resources.trainer import TrainingSummary


def table_version(frame: pl.DataFrame) -> str:
    """A hash of a table's content: equal content, equal version, whatever run made it."""
    return hashlib.sha256(frame.write_ndjson().encode()).hexdigest()[:16]


def table_output(value: pl.DataFrame, **metadata: Any) -> dg.Output[pl.DataFrame]:
    """A table with its content version and metadata; sample rows and counts are added where it is stored."""
    return dg.Output(value, data_version=dg.DataVersion(table_version(value)), metadata=metadata)


def checkpoint_output(value: Checkpoint, **metadata: Any) -> dg.Output[Checkpoint]:
    """A checkpoint with its sha as content version, and where it lies."""
    about: dict[str, Any] = {"sha": value.sha, "path": dg.MetadataValue.path(value.weights)}
    parents = value.manifest["parents"]
    about |= {f"{role} checkpoint": f"{parent['asset']} {parent['sha'][:16]}" for role, parent in parents.items()}
    return dg.Output(value, data_version=dg.DataVersion(value.sha[:16]), metadata=about | metadata)


def made_by(checkpoint: Checkpoint) -> dict[str, Any]:
    """Metadata that names the checkpoint that produced a table."""
    return {"checkpoint": checkpoint.label, "checkpoint_sha": checkpoint.sha}


SHOWN_STEPS = 50
SHOWN_LOG_VALUES = {"loss", "learning_rate", "step", "rewards", "logps", "accuracy", "margin", "mean_token_accuracy"}


def training_metadata(summary: TrainingSummary) -> dict[str, Any]:
    """Metadata of a training run, with the logged values of the steps, thinned out in long runs, as a table."""
    names = sorted({name for entry in summary.history for name in entry if name.split("/")[0] in SHOWN_LOG_VALUES})
    names = ["step", *[name for name in names if name != "step"]]
    every = max(1, len(summary.history) // SHOWN_STEPS)
    shown = summary.history[::every]
    records = [dg.TableRecord({name: _number(entry.get(name)) for name in names}) for entry in shown]
    return summary.metadata() | {"training_log": dg.MetadataValue.table(records)}


def _number(value: Any) -> float | None:
    return None if value is None else float(f"{float(value):.5g}")
