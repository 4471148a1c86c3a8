"""What an asset shows about itself in the UI, and the content version that staleness is judged by."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import dagster as dg
import polars as pl
from dagster import DagsterInstance

from resources.common.text import asset_label
from resources.models.device import peak_memory
from resources.storage.checkpoint_store import Checkpoint
from resources.training.trainer import TrainingSummary
from synpo_assets.graph.history import data_version, newest


def table_version(frame: pl.DataFrame) -> str:
    """A hash of a table's content: equal content, equal version, whatever run made it."""
    return hashlib.sha256(frame.write_ndjson().encode()).hexdigest()[:16]


def table_output(context: dg.AssetExecutionContext, value: pl.DataFrame, **metadata: Any) -> dg.Output[pl.DataFrame]:
    """A table with its content version, metadata and memory used; sample rows and counts are added where it is stored."""
    about = {**peak_memory(), **metadata, "made_from": made_from(context)}
    return dg.Output(value, data_version=dg.DataVersion(table_version(value)), metadata=about)


def checkpoint_output(context: dg.AssetExecutionContext, value: Checkpoint, **metadata: Any) -> dg.Output[Checkpoint]:
    """A checkpoint with its sha as content version, where it lies, its memory, and the checkpoints that it was made from."""
    about: dict[str, Any] = {"sha": value.sha, "path": dg.MetadataValue.path(value.weights)}
    parents = value.manifest["parents"]
    if parents:
        about["parents"] = checkpoints_table(
            (role, parent["asset"], parent["sha"], parent["run_id"]) for role, parent in parents.items()
        )
    about |= {**peak_memory(), **metadata, "made_from": made_from(context)}
    return dg.Output(value, data_version=dg.DataVersion(value.sha[:16]), metadata=about)


def made_by(checkpoint: Checkpoint) -> dict[str, Any]:
    """Metadata that names the checkpoint that produced something, with links to its asset, iteration and run."""
    return {
        "checkpoint": checkpoint.label,
        "checkpoint_sha": checkpoint.sha,
        "checkpoint_asset": dg.MetadataValue.asset(dg.AssetKey(checkpoint.asset)),
        "checkpoint_page": dg.MetadataValue.url(_page(checkpoint.asset, checkpoint.partition)),
        "checkpoint_run": dg.MetadataValue.dagster_run(checkpoint.manifest["run_id"]),
    }


def checkpoints_table(checkpoints: Iterable[tuple[str, str, str, str]]) -> dg.MarkdownMetadataValue:
    """A table of checkpoints as links that work in the UI.

    Args:
        checkpoints: Of each its role, its label (`model_checkpoint[0001]`), its sha and the run that made it.
    """
    lines = [["role", "checkpoint", "sha", "run"], ["---"] * 4]
    for role, label, sha, run_id in checkpoints:
        asset, _, partition = label.removesuffix("]").partition("[")
        lines.append([role, f"[{label}]({_page(asset, partition or None)})", f"`{sha[:16]}`", _run(run_id)])
    return _markdown(lines)


def made_from(context: dg.AssetExecutionContext) -> dg.MarkdownMetadataValue:
    """The content versions of everything that the running asset depends on, with links to their pages and runs."""
    graph = context.job_def.asset_layer.asset_graph
    parents = [graph.get(key) for key in sorted(graph.get(context.asset_key).parent_keys)]
    inputs = [
        (node.key.to_user_string(), context.partition_key if node.partitions_def is not None else None)
        for node in parents
    ]
    return versions_table(context.instance, inputs)


def versions_table(
    instance: DagsterInstance, inputs: Sequence[tuple[str, str | None]], **columns: Sequence[Any]
) -> dg.MarkdownMetadataValue:
    """A table of assets and iterations with content version and run, as links that work in the UI.

    Args:
        instance: Knows the newest materialization of each.
        inputs: Pairs of asset and iteration, which is None for assets made once.
        columns: Further columns, one value per input.
    """
    lines = [["asset", *columns, "content version", "run"]]
    for (asset, partition), *values in zip(inputs, *columns.values(), strict=True):
        record = newest(instance, asset, partition)
        version = f"`{data_version(record)}`"
        run = _run(record.run_id) if record else "none"
        lines.append([f"[{asset_label(asset, partition)}]({_page(asset, partition)})", *map(str, values), version, run])
    lines.insert(1, ["---"] * len(lines[0]))
    return _markdown(lines)


def _run(run_id: str) -> str:
    return f"[{run_id[:8]}](/runs/{run_id})"


def _markdown(lines: list[list[str]]) -> dg.MarkdownMetadataValue:
    return dg.MetadataValue.md("\n".join(f"| {' | '.join(line)} |" for line in lines))


def _page(asset: str, partition: str | None) -> str:
    """The address of an asset or iteration in the UI."""
    return f"/assets/{asset}" + (f"?view=partitions&partition={partition}" if partition else "")


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
