"""What tests put in the place of a whole experiment: its services in an empty home, and assets that say what they are told."""

import dataclasses
import uuid
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
from dagster._core.definitions.assets.graph.asset_graph import AssetGraph

from definitions import build
from synpo_assets.algorithm import stages_of
from synpo_assets.graph.metrics import Metric, record
from synpo_assets.graph.partitions import iterations
from synpo_assets.graph.services import Services, open_services
from synpo_assets.graph.stage import Stage
from synpo_assets.method.rules import CONSTRAINTS
from tests.nano import active_settings

EMPTY_JOB = dg.Definitions([dg.AssetSpec("anything")]).resolve_implicit_global_asset_job_def()
ITERATIONS = iterations(active_settings())
# By the settings that they were made for, as JSON.
GRAPHS: dict[str, AssetGraph] = {}


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as ephemeral:
        yield ephemeral


def services_in(home, settings=None) -> Services:
    """The services of an experiment in a directory; the nano settings if none are given."""
    settings = settings or active_settings()
    return open_services(settings, home, graph_of(settings))


def graph_of(settings) -> AssetGraph:
    """The graph of an experiment, made once for equal settings, unless what they name decides it, too."""
    stated, usual = settings.model_dump_json(), active_settings()
    if settings.preferences.reviewed or settings.benchmarks != usual.benchmarks or ".jinja" in stated:
        return _graph(settings)
    if stated not in GRAPHS:
        GRAPHS[stated] = _graph(settings)
    return GRAPHS[stated]


def _graph(settings) -> AssetGraph:
    return build(settings, Path("/nowhere"))[1].graph


def run(stages, instance, services, partition=None, **options):
    """Materializes stages and other assets with the services of an experiment."""
    sides = {each.side: each.name for each in stages_of(services.settings) if each.side}
    assets = [each.asset(services.settings, sides, []) if isinstance(each, Stage) else each for each in stages]
    services = dataclasses.replace(services, checkpoints=services.checkpoints.of_run(uuid.uuid4().hex))
    resources = {"services": services, "tables": services.tables, "checkpoints": services.checkpoints}
    return dg.materialize(assets, instance=instance, resources=resources, partition_key=partition, **options)


def begun_run(instance, status, tags=None, step="anything"):
    """A run one step of which has started."""
    begun = instance.create_run_for_job(EMPTY_JOB, status=status, tags=tags)
    instance.report_dagster_event(dg.DagsterEvent("STEP_START", EMPTY_JOB.name, step_key=step), begun.run_id)
    return begun


def measured(services, asset, *metrics, partition="0001"):
    """Records metrics as an asset would."""
    record(services.metrics, asset, partition, metrics)


def win_rates(value, by, over="initial", **more):
    """The metric that says how often M_t wins."""
    return Metric("win_rate", value, of="candidate", over=over, by=by, **more)


def without_rules(prompts):
    """The same prompts, none of which has rules."""
    return prompts.with_columns(constraints=pl.lit([], CONSTRAINTS))


def scored(joined, chosen, rejected):
    """Two sides with their scores by a reward model."""
    scores = {"chosen_score": chosen, "rejected_score": rejected, "score_convention": pl.lit("reward_difference")}
    return without_rules(joined).with_columns(**scores)


def judged_answers(over_initial, over_previous=None, lengths=None, split="dev"):
    """Of the table `evaluation` what the gate reads: outcomes, and answers of some lengths (M_t's, M_0's)."""
    mine, others = zip(*(lengths or [(9, 9)] * len(over_initial)), strict=True)
    return pl.DataFrame({
        "prompt_id": [f"prompt-{number}" for number in range(len(over_initial))], "split": split,
        "judge_over_initial": over_initial, "judge_over_previous": over_previous or over_initial,
        "candidate_response": ["x" * length for length in mine], "initial_response": ["x" * length for length in others],
    })  # fmt: skip


def shown(instance, asset, partition=None):
    """The metadata of the newest materialization, as the UI shows it."""
    wanted = dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset), asset_partitions=[partition] if partition else None)
    records = instance.fetch_materializations(wanted, limit=1).records
    return {name: entry.value for name, entry in records[0].asset_materialization.metadata.items()} if records else {}
