"""The boosting report: all finished iterations side by side, as a table, plots and a page.

Paper: tables and figures over four iterations (section 3). Here: the metrics, tables and training logs of each iteration, so that
the report can be made again at any time without a model.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg
from pydantic import ValidationError

from resources.common.errors import FinalError
from resources.judging.judge_choice import INDEPENDENT
from resources.settings.settings import Settings
from resources.storage.files import json_sha256, write_atomically
from resources.training.losses import loss_module
from synpo_assets.graph.boosting import boosting_table
from synpo_assets.graph.history import data_version_of, made_again, seconds_of
from synpo_assets.graph.metrics import Metrics, judge_doubt, recorded
from synpo_assets.graph.presentation import versions_table, written_output
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import LAST, STATE_TAG, Stage
from synpo_assets.graph.texts import rate_text
from synpo_assets.graph.used_settings import optimized_with, used_in
from synpo_assets.method.judging import BOTH_ENDED
from synpo_assets.reports import FOLDER, REPORT
from synpo_assets.reports.answers import same_prompts
from synpo_assets.reports.finished import FinishedIteration
from synpo_assets.reports.identity import identity_of, telling_settings
from synpo_assets.reports.page import Page, judging_rows, sample_pairs
from synpo_assets.reports.plots import draw_plots
from synpo_assets.reports.rows import Row, report_notes, report_rows
from synpo_assets.reports.tracking import track
from synpo_assets.reports.verdict import verdict
from synpo_assets.stages.loop import promotion_verdict
from synpo_assets.stages.scorers import NULLS

READ_ASSETS = ("preference_pairs", "model_checkpoint", "evaluation", "promotion")


# In the graph it depends on all else that its iteration ends with, too (graph/stage.py): of that it reads what was recorded.
@Stage(group="evaluation", state=True, kinds=("matplotlib",), deps=READ_ASSETS)
def boosting_report(context: dg.AssetExecutionContext, services: dg.ResourceParam[Services]) -> dg.MaterializeResult:
    """All finished iterations side by side: rows, pass rates, margins, rewards, cost (paper, section 3).

    Start with `verdict` and `boosting`; `report` links to the whole page.
    """
    finished, unfinished = iterations_of(context.instance, services)
    if not finished:
        raise FinalError("No iteration is finished: materialize one up to its evaluation first, and there is a report.")
    iterations = [read_iteration(context.instance, services, key) for key in finished]
    page = page_of(services, iterations, unfinished)
    path, version = services.home / FOLDER / REPORT, _content_version(page)
    write_atomically(path, page.html().encode())
    pictures = "\n\n".join(f"![{plot.description}]({plot.data_uri})" for plot in page.plots.values())
    tracked = track(services.home, services.settings, iterations, path)
    return written_output(
        context,
        services,
        version,
        boosting=boosting_table(context, services, [], iterations[-1].judge_doubt),
        # An address below that of the UI (cli/webserver.py); the version makes a browser ask for the newest.
        report=dg.MetadataValue.url(f"/{FOLDER}/{path.name}?{version}"),
        verdict=" ".join(verdict(iterations[-1])),
        plots=dg.MetadataValue.md(pictures),
        path=dg.MetadataValue.path(path),
        iterations=", ".join(finished),
        notes=" ".join(page.notes) or "none",
        tracked_as=tracked or "not tracked: training_processes.report_to is none",
        made_of=versions_table(context.instance, [(asset, key) for key in finished for asset in READ_ASSETS]),
        table=_table(page.rows, finished),
    )


def page_of(services: Services, iterations: Sequence[FinishedIteration], unfinished: Sequence[str]) -> Page:
    """What the page shows of the finished iterations; of the others it says that they are missing."""
    return Page(
        iterations=iterations,
        rows=report_rows(iterations),
        plots={plot.name: plot for plot in draw_plots(iterations)},
        notes=report_notes(iterations, unfinished),
        judging=judging_rows(recorded(services.metrics, None)),
        identity=identity_of(services, iterations),
        settings=telling_settings(services, iterations[-1]),
        answers=same_prompts(services.tables.scan("evaluation"), iterations),
    )


def iterations_of(instance: dg.DagsterInstance, services: Services) -> tuple[list[str], list[str]]:
    """The iterations that are finished, and those that were begun only.

    An iteration is finished when there is an M_t, its pairs are those that it was trained on, and its evaluation judged that M_t,
    not an earlier one.
    """
    nodes = [services.graph.get(key) for key in services.graph.materializable_asset_keys]
    # What looks up the iteration before may exist before anything is made.
    own = {node.key.to_user_string() for node in nodes if node.is_partitioned and STATE_TAG not in node.tags}
    begun, finished = list[str](), list[str]()
    for key in services.metrics.partitions():
        measured = recorded(services.metrics, key)
        if own.isdisjoint(measured.assets):
            continue
        evaluated, made = measured.candidate, data_version_of(instance, "model_checkpoint", key)
        done = evaluated is not None and made is not None and evaluated.startswith(made)
        if done and (manifest := services.checkpoints.manifest("model_checkpoint", key)):
            done = not made_again(instance, manifest["trained_on"])
        (finished if done else begun).append(key)
    return finished, begun


def read_iteration(instance: dg.DagsterInstance, services: Services, key: str) -> FinishedIteration:
    """What is known of a finished iteration; its checkpoints may be gone."""
    # The report does not report itself.
    metrics, sentence = recorded(services.metrics, key).without(LAST).of_its_candidate, judge_doubt(services.metrics)
    manifest = services.checkpoints.manifest("model_checkpoint", key) or {}
    refused = (promoted := metrics.find("promoted", "candidate")) is not None and not promoted.value
    seconds = sum(seconds_of(instance, asset, key) for asset in metrics.assets)
    return FinishedIteration(
        key=key,
        metrics=metrics.without_rates_by(INDEPENDENT) if sentence else metrics,
        seconds=seconds,
        cost=services.settings.cost.money(seconds),
        pairs=services.tables.read("preference_pairs", key),
        training_log=services.checkpoints.training_log("model_checkpoint", key),
        reward_axis=_reward_axis(manifest, services.settings),
        manifest=manifest,
        settings=used_in(services.used_settings, key),
        refusal=promotion_verdict(services, key) if refused else None,
        judge_doubt=sentence,
        no_better_than_length=_no_better_than_length(recorded(services.metrics, None)),
    )


def _no_better_than_length(once: Metrics) -> str | None:
    """What to say where the judge is not right about gold more often than whoever goes by length; None where it is."""
    judge, length = (
        once.find("held_out_accuracy", BOTH_ENDED, by=by, asset="judge_model") for by in (None, NULLS["length_alone"])
    )
    if judge is None or judge.low is None or length is None or length.value is None or judge.low > length.value:
        return None
    return (
        f"The judge is right about {rate_text(judge)} of {judge.n} held-out pairs, gold over M_0, and length alone about "
        f"{rate_text(length)}."
    )


def _reward_axis(manifest: Mapping[str, Any], settings: Settings) -> str:
    """Of the loss that M_t was trained with; of the settings' own where another version, with other settings, trained it."""
    try:
        loss = optimized_with(manifest, settings).loss
    except ValidationError:
        loss = settings.preference_optimization.loss
    return loss_module(loss.kind).REWARD_AXIS


def _content_version(page: Page) -> str:
    """A hash of what the report says; how long it took, what was computed again and where it is do not count."""
    content: dict[str, object] = {
        "rows": [(row.section, row.label, row.cells) for row in page.rows if row.section != "Work"],
        "samples": [sample_pairs(iteration.pairs) for iteration in page.iterations],
        "notes": [*page.notes, *map(str, page.judging)],
        "answers": list(map(dataclasses.asdict, page.answers)),
    }
    return json_sha256(content)[:16]


def _table(rows: Sequence[Row], keys: list[str]) -> dg.TableMetadataValue:
    names = ["section", "metric", *keys]
    records = [dg.TableRecord(dict(zip(names, (row.section, row.label, *row.cells), strict=True))) for row in rows]
    return dg.MetadataValue.table(records, schema=dg.TableSchema([dg.TableColumn(name) for name in names]))
