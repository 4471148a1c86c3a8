"""What an asset shows about itself in the UI, and the content version that staleness is judged by."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import dagster as dg
import polars as pl
from dagster import DagsterInstance
from dagster._core.definitions.assets.graph.asset_graph import AssetGraph
from dagster._core.definitions.data_version import CODE_VERSION_TAG

from resources.common.text import asset_label, labelled
from resources.models.device import peak_memory
from resources.storage.checkpoint_store import Checkpoint, CheckpointStore
from resources.training.job import TrainingSummary
from synpo_assets.graph.curves import training_curves
from synpo_assets.graph.history import data_version_of, newest, seconds_so_far
from synpo_assets.graph.metrics import WORK, Metric, record
from synpo_assets.graph.partitions import partition_of
from synpo_assets.graph.services import Services
from synpo_assets.graph.texts import MISSING, metric_text
from synpo_assets.graph.used_settings import record_settings

SHOWN_STEPS = 50
# What people look for comes first.
HEADLINES = ("verdict", "boosting", "report")
# The widest column is the last: what does not fit is beyond the edge of the page.
METRIC_COLUMNS = dg.TableSchema([
    dg.TableColumn("value", description="In its unit."),
    dg.TableColumn("low", description="Lower end of its 95 % interval."),
    dg.TableColumn("high", description="Upper end of its 95 % interval."),
    dg.TableColumn("n", description="How many it is taken over."),
    dg.TableColumn("split", description="Of the held-out prompts: test is reported, dev is for the gate."),
    dg.TableColumn("metric", description="What was measured, of whom, compared with whom, by which judge."),
])  # fmt: skip
SHOWN_LOG_VALUES = {"loss", "learning_rate", "step", "rewards", "logps", "accuracy", "margin", "mean_token_accuracy"}


def table_version(frame: pl.DataFrame) -> str:
    """A hash of a table's content: equal content, equal version, whatever run made it."""
    return hashlib.sha256(frame.write_ndjson().encode()).hexdigest()[:16]


def table_output(
    context: dg.AssetExecutionContext,
    services: Services,
    frame: pl.DataFrame,
    metrics: Sequence[Metric] = (),
    /,
    **shown: Any,
) -> dg.Output[pl.DataFrame]:
    """A table with its content version; row count and memory join its metrics, sample rows are added where it is stored."""
    measured = [Metric("rows", frame.height), *metrics]
    return dg.Output(frame, **_recorded(context, services, table_version(frame), measured, shown))


def streamed_output(
    context: dg.AssetExecutionContext,
    services: Services,
    frame: pl.LazyFrame,
    version: str,
    metrics: Sequence[Metric] = (),
    /,
    **shown: Any,
) -> dg.Output[pl.LazyFrame]:
    """A table that is never held in memory as a whole, with the content version that its rows gave while they were made."""
    return dg.Output(frame, **_recorded(context, services, version, metrics, shown))


def checkpoint_output(
    context: dg.AssetExecutionContext,
    services: Services,
    made: Checkpoint,
    metrics: Sequence[Metric] = (),
    /,
    **shown: Any,
) -> dg.Output[Checkpoint]:
    """A checkpoint with its sha as content version, where it is kept, and the checkpoints that it was made from."""
    shown["read_by"] = _read_by(context, services)
    if parents := made.manifest["parents"]:
        shown["parents"] = checkpoints_table(
            (role, parent["asset"], parent["sha"], parent["run_id"]) for role, parent in parents.items()
        )
    shown |= {"sha": made.sha, "path": dg.MetadataValue.path(made.weights)}
    return dg.Output(made, **_recorded(context, services, made.sha[:16], metrics, shown))


def written_output(
    context: dg.AssetExecutionContext, services: Services, version: str, metrics: Sequence[Metric] = (), /, **shown: Any
) -> dg.MaterializeResult:
    """Files that an asset has written by itself, with their content version."""
    return dg.MaterializeResult(**_recorded(context, services, version, metrics, shown))


def _version_tags(context: dg.AssetExecutionContext, services: Services) -> dict[str, str]:
    """The code version where the changes of this run decide something of the running asset; else Dagster's is right."""
    if not services.changes:
        return {}
    version = services.graph.get(context.asset_key).code_version
    of_the_home = context.job_def.asset_layer.get(context.asset_key).code_version
    return {CODE_VERSION_TAG: version} if version and version != of_the_home else {}


def _recorded(
    context: dg.AssetExecutionContext,
    services: Services,
    version: str,
    metrics: Sequence[Metric],
    shown: dict[str, Any],
) -> dict[str, Any]:
    """Keeps the metrics and settings of the running asset; content version, tags and metadata for Dagster, headlines first."""
    memory = peak_memory()
    rows = [*metrics, Metric("peak_memory_gb", memory["peak_memory_gb"])]
    if (of_gpu := memory.get("peak_gpu_memory_gb")) is not None:
        rows.append(Metric("peak_gpu_memory_gb", of_gpu))
    record(services.metrics, context.asset_key.to_user_string(), partition_of(context), rows)
    headlines = {name: shown[name] for name in HEADLINES if name in shown}
    figures = {"metrics": _metrics_table([row for row in rows if row.metric not in WORK], shown)}
    work: dict[str, Any] = {"work": _metrics_table([row for row in rows if row.metric in WORK], shown)}
    if services.settings.cost.per_hour:
        work["cost"] = services.settings.cost.text(seconds_so_far(context))
    tags = _version_tags(context, services)
    made_with = {"made_with": ", ".join(services.changes)} if tags else {}
    made = made_with | record_settings(context, services) | {"made_from": made_from(context)}
    # Once more as numbers, which the UI draws over iterations.
    plotted = {row.label: None if row.value is None else round(row.value, 4) for row in rows}
    # What is shown for a figure stands in its place: a sentence where a judge cannot judge.
    in_place = {name: shown[name] for name in plotted if name in shown}
    metadata = headlines | figures | shown | made | work | plotted | in_place
    return {"data_version": dg.DataVersion(version), "metadata": metadata, "tags": tags}


def _metrics_table(rows: Iterable[Metric], shown: Mapping[str, Any]) -> dg.TableMetadataValue:
    """Metrics with their 95 % intervals, one a row; without those in whose place something else is shown."""
    records = [
        dg.TableRecord({
            "metric": row.label.removesuffix(" (dev)"),
            "value": metric_text(row.metric, row.value),
            "low": metric_text(row.metric, row.low),
            "high": metric_text(row.metric, row.high),
            "n": MISSING if row.n is None else f"{row.n:,}",
            "split": row.split or MISSING,
        })
        for row in rows
        if row.label not in shown
    ]  # fmt: skip
    return dg.MetadataValue.table(records, schema=METRIC_COLUMNS)


def made_by(checkpoint: Checkpoint) -> dict[str, Any]:
    """Metadata that names the checkpoint that produced something, with links to its asset, iteration and run."""
    return {
        "checkpoint": checkpoint.label,
        "checkpoint_sha": checkpoint.sha,
        "checkpoint_asset": dg.MetadataValue.asset(dg.AssetKey(checkpoint.asset)),
        "checkpoint_page": dg.MetadataValue.url(asset_page(checkpoint.asset, checkpoint.partition)),
        "checkpoint_run": dg.MetadataValue.dagster_run(checkpoint.manifest["run_id"]),
    }


def checkpoints_table(checkpoints: Iterable[tuple[str, str, str, str]]) -> dg.MarkdownMetadataValue:
    """A table of checkpoints (role, label, sha, and the run that made it) as links that work in the UI."""
    lines = [["role", "checkpoint", "sha", "run"], ["---"] * 4]
    for role, label, sha, run_id in checkpoints:
        lines.append([role, label_link(label), f"`{sha[:16]}`", run_link(run_id)])
    return _markdown(lines)


def writers_table(store: CheckpointStore, shas: Mapping[str, pl.Series]) -> dg.MarkdownMetadataValue:
    """The checkpoints that wrote, or scored, the rows of a table, of which each role has a column of shas; those that are kept."""
    asked = [(role, sha) for role, column in shas.items() for sha in column.unique(maintain_order=True)]
    return checkpoints_table(
        (role, asset_label(manifest["asset"], manifest["partition"]), sha, manifest["run_id"])
        for role, sha in asked
        if (manifest := store.manifest_of_sha(sha))
    )


def made_from(context: dg.AssetExecutionContext) -> dg.MarkdownMetadataValue:
    """The content versions of everything that the running asset depends on, with links to their pages and runs."""
    graph = context.job_def.asset_layer.asset_graph
    return versions_table(
        context.instance, _in_this_iteration(context, graph, graph.get(context.asset_key).parent_keys)
    )


def _read_by(context: dg.AssetExecutionContext, services: Services) -> dg.MarkdownMetadataValue:
    """Links to what is made with the running asset's model: the way forward, as `made_from` is the way back."""
    # The graph of a run knows of nothing that the run leaves out.
    graph = services.graph
    found = _in_this_iteration(
        context, graph, graph.get(context.asset_key).child_keys & graph.materializable_asset_keys
    )
    return dg.MetadataValue.md(", ".join(asset_link(asset, partition) for asset, partition in found) or "nothing")


def _in_this_iteration(
    context: dg.AssetExecutionContext, graph: AssetGraph, keys: Iterable[dg.AssetKey]
) -> list[tuple[str, str | None]]:
    """Assets with the iteration of the running one; None where they, or it, are made once."""
    partition = partition_of(context)
    nodes = [graph.get(key) for key in sorted(keys)]
    return [(node.key.to_user_string(), partition if node.partitions_def is not None else None) for node in nodes]


def label_link(label: str) -> str:
    """A link to the page of an asset or iteration, given as people name it: `model_checkpoint[0001]`."""
    return asset_link(*labelled(label))


def asset_link(asset: str, partition: str | None) -> str:
    """A link to the page of an asset or iteration in the UI."""
    return f"[{asset_label(asset, partition)}]({asset_page(asset, partition)})"


def versions_table(
    instance: DagsterInstance,
    inputs: Sequence[tuple[str, str | None]],
    read: Mapping[str, str] | None = None,
    **columns: Sequence[Any],
) -> dg.MarkdownMetadataValue:
    """A table of assets and iterations (None: made once) with content version and run as links, and further columns.

    Args:
        read: The versions that were read, by label, where they may have been made again since.
    """
    lines = [["asset", *columns, "content version", "run"]]
    for (asset, partition), *values in zip(inputs, *columns.values(), strict=True):
        newest_version, record = data_version_of(instance, asset, partition), newest(instance, asset, partition)
        version = (read or {}).get(asset_label(asset, partition), newest_version)
        run = run_link(record.run_id) if record else "none"
        if version != newest_version:
            run = "an earlier one: it was made again since"
        lines.append(
            [
                asset_link(asset, partition),
                *map(str, values),
                f"`{version}`",
                run,
            ]
        )
    lines.insert(1, ["---"] * len(lines[0]))
    return _markdown(lines)


def training_log(summary: TrainingSummary) -> dict[str, Any]:
    """A training run for the UI: its curves, its log as a table, thinned out if long, and where a tracker shows it."""
    names = sorted({name for entry in summary.history for name in entry if name.split("/")[0] in SHOWN_LOG_VALUES})
    names = ["step", *[name for name in names if name != "step"]]
    every = max(1, len(summary.history) // SHOWN_STEPS)
    # Counted from the end, so that the last step is always among them.
    shown = summary.history[::-1][::every][::-1]
    records = [dg.TableRecord({name: _number(entry.get(name)) for name in names}) for entry in shown]
    log: dict[str, Any] = {"curves": training_curves(summary.history), "training_log": dg.MetadataValue.table(records)}
    if (place := summary.tracked) is not None:
        is_page = place.startswith(("http://", "https://"))
        log["tracker"] = dg.MetadataValue.url(place) if is_page else dg.MetadataValue.text(place)
    return log


def run_link(run_id: str) -> str:
    """A link to the page of a run in the UI."""
    return f"[{run_id[:8]}](/runs/{run_id})"


def _markdown(lines: list[list[str]]) -> dg.MarkdownMetadataValue:
    return dg.MetadataValue.md("\n".join(f"| {' | '.join(line)} |" for line in lines))


def asset_page(asset: str, partition: str | None) -> str:
    """The address of an asset or iteration in the UI."""
    return f"/assets/{asset}" + (f"?view=partitions&partition={partition}" if partition else "")


def _number(value: Any) -> float | None:
    return None if value is None else float(f"{float(value):.5g}")
