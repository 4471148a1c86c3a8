"""The boosting report: all finished iterations beside each other, as a table, plots and a page.

Paper: tables and figures over four iterations (section 3). Here: what the assets recorded of each iteration, read back
from Dagster's history and the tables, so that the report can be made again at any time without a model.
"""

from typing import Any

import dagster as dg
from dagster import DagsterInstance

from resources.common.errors import FinalError
from resources.common.text import visible
from resources.settings.files import home_directory
from resources.storage.files import json_sha256, write_atomically
from resources.storage.tables import ParquetTables
from synpo_assets.graph.history import metadata_of, seconds_of
from synpo_assets.graph.partitions import GROUP, RETRIES, code_version
from synpo_assets.graph.presentation import versions_table
from synpo_assets.reports import plots
from synpo_assets.reports import rows as report_method
from synpo_assets.reports.plots import draw_plots
from synpo_assets.reports.rows import (
    FinishedIteration,
    Row,
    report_html,
    report_notes,
    report_rows,
    sample_pairs,
)

# What an iteration makes, in order. The two state assets are left out: they may exist before their iteration begins.
READ_ASSETS = (
    "keyword_sets", "synthetic_prompts", "prompt_diversity", "seed_responses", "response_improver", "base_responses",
    "initial_responses", "refined_responses", "preference_pairs", "model_checkpoint", "evaluation",
    "instruction_following", "gold_comparison", "promotion",
)  # fmt: skip


@dg.asset(
    # It reads more than this; the last asset of an iteration stands for all of it in the graph.
    deps=["promotion"],
    group_name=GROUP,
    kinds={"matplotlib"},
    retry_policy=RETRIES,
    code_version=code_version(report_method, plots),
)
def boosting_report(context: dg.AssetExecutionContext, tables: dg.ResourceParam[ParquetTables]) -> dg.MaterializeResult:
    """All finished iterations beside each other: rows, pass rates, margins, rewards, cost (paper, section 3)."""
    finished, unfinished = iterations_of(context.instance)
    if not finished:
        raise FinalError(
            "No iteration is finished, so there is nothing to report: materialize an iteration up to its evaluation first."
        )
    iterations = [read_iteration(context.instance, tables, key) for key in finished]
    drawn = draw_plots(iterations)
    rows, notes = report_rows(iterations), report_notes(iterations, unfinished)
    path = home_directory() / "reports" / "boosting_report.html"
    write_atomically(path, report_html(iterations, drawn, notes, visible).encode())
    inputs = [
        (asset, key)
        for key in finished
        for asset in ("preference_pairs", "model_checkpoint", "evaluation", "promotion")
    ]
    return dg.MaterializeResult(
        data_version=dg.DataVersion(_content_version(iterations, rows, notes)),
        metadata={
            "path": dg.MetadataValue.path(path),
            "iterations": ", ".join(finished),
            "notes": " ".join(notes) or "none",
            **{plot.name: dg.MetadataValue.md(f"![{plot.description}]({plot.data_uri})") for plot in drawn},
            "made_from": versions_table(context.instance, inputs),
            "table": _table(rows, finished),
        },
    )


def iterations_of(instance: DagsterInstance) -> tuple[list[str], list[str]]:
    """The iterations that are finished, and those that were begun only.

    An iteration is finished when its M_t is materialized and its evaluation judged that M_t, not an earlier one.
    """
    begun = set().union(*(instance.get_materialized_partitions(dg.AssetKey(asset)) for asset in READ_ASSETS))
    finished = []
    for key in sorted(begun):
        made, judged = (metadata_of(instance, asset, key) for asset in ("model_checkpoint", "evaluation"))
        if judged and judged.get("checkpoint_sha") == made.get("sha"):
            finished.append(key)
    return finished, sorted(begun - set(finished))


def read_iteration(instance: DagsterInstance, tables: ParquetTables, key: str) -> FinishedIteration:
    """What history and tables hold of a finished iteration; its checkpoints may be gone.

    Raises:
        FileNotFoundError: Its table of pairs was deleted.
    """
    metadata = {asset: metadata_of(instance, asset, key) for asset in READ_ASSETS}
    log, rates = metadata["model_checkpoint"].get("training_log"), metadata["evaluation"].get("win_rates")
    return FinishedIteration(
        key=key,
        metadata=metadata,
        seconds=sum(seconds_of(instance, asset, key) for asset in READ_ASSETS),
        pairs=tables.read("preference_pairs", key),
        training_log=[record.data for record in log.records] if log else [],
        win_rates=[record.data for record in rates.records] if rates else [],
    )


def _content_version(iterations: list[FinishedIteration], rows: list[Row], notes: list[str]) -> str:
    """A hash of what the report says; how long it took and what was computed again do not count."""
    content: dict[str, Any] = {
        "rows": [(row.section, row.label, row.cells) for row in rows if row.section != "Work"],
        "samples": [sample_pairs(iteration.pairs) for iteration in iterations],
        "notes": notes,
    }
    return json_sha256(content)[:16]


def _table(rows: list[Row], keys: list[str]) -> dg.TableMetadataValue:
    names = ["section", "figure", *keys]
    records = [dg.TableRecord(dict(zip(names, (row.section, row.label, *row.cells), strict=True))) for row in rows]
    return dg.MetadataValue.table(records, schema=dg.TableSchema([dg.TableColumn(name) for name in names]))
