"""What an asset shows of its metrics: one table for readers first, and the same as numbers, which the UI draws."""

import types

import dagster as dg
import polars as pl

from definitions import build
from resources.settings.files import load_settings
from synpo_assets.cli.automation import ALL_ASSETS_JOB
from synpo_assets.graph.metrics import Metric
from synpo_assets.graph.presentation import METRIC_COLUMNS, writers_table, written_output
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import Stage
from tests.nano import nano_settings, write_settings
from tests.stand_ins import instance as instance
from tests.stand_ins import run, services_in, shown

RATE = Metric("win_rate", 0.58333333, "candidate", "initial", "judge", 0.25, 0.9166, 12, split="test")
MEASURED = [RATE, Metric("rows", 12345), Metric("generation_seconds", 150.0), Metric("mean_margin", 3.3160476)]


@Stage(group="evaluation")
def measured(context: dg.AssetExecutionContext, services: dg.ResourceParam[Services]) -> dg.MaterializeResult:
    return written_output(context, services, "version", MEASURED, verdict="It is better.", plot="a plot")


@Stage(group="evaluation")
def doubted(context: dg.AssetExecutionContext, services: dg.ResourceParam[Services]) -> dg.MaterializeResult:
    return written_output(context, services, "version", MEASURED, **{RATE.label: "It is at chance."})


def test_metrics_stand_in_one_table_after_the_verdict_and_as_numbers_at_the_end(instance, tmp_path):
    run([measured], instance, services_in(tmp_path), "0001")
    found = shown(instance, "measured", "0001")
    names = [column.name for column in METRIC_COLUMNS.columns]
    rows = [tuple(record.data[name] for name in names) for record in found["metrics"].records]
    assert [*found][:3] == ["verdict", "metrics", "plot"]
    assert rows == [
        ("58.3%", "25.0%", "91.7%", "12", "test", "win_rate of candidate over initial by judge"),
        ("12,345", "—", "—", "—", "—", "rows"),
        ("3.316", "—", "—", "—", "—", "mean_margin"),
    ]
    assert [record.data["metric"] for record in found["work"].records] == ["generation_seconds", "peak_memory_gb"]
    assert found["work"].records[0].data["value"] == "2.5 min"
    assert found[RATE.label] == 0.5833
    assert found["mean_margin"] == 3.316
    assert [*found].index("work") < [*found].index(RATE.label)


def test_in_place_of_what_a_judge_cannot_judge_stands_a_sentence(instance, tmp_path):
    run([doubted], instance, services_in(tmp_path), "0001")
    found = shown(instance, "doubted", "0001")
    assert found[RATE.label] == "It is at chance."
    assert RATE.label not in [record.data["metric"] for record in found["metrics"].records]


def test_a_checkpoint_links_to_all_that_reads_it_whatever_the_run_makes_and_to_nothing_that_is_off(
    instance, tmp_path, nano_model
):
    settings = load_settings(write_settings(tmp_path / "mine.yaml", nano_settings(nano_model)))
    job = build(settings, tmp_path / "home")[0].resolve_job_def(ALL_ASSETS_JOB)
    assert job.execute_in_process(asset_selection=[dg.AssetKey("initial_policy")], instance=instance).success
    read_by = shown(instance, "initial_policy")["read_by"]
    assert "[seed_pairs](/assets/seed_pairs)" in read_by
    assert "benchmark_" not in read_by


def test_every_checkpoint_that_wrote_a_row_of_a_side_is_named_and_only_those_that_are_kept():
    known = {
        sha: {"asset": "response_improver", "partition": partition, "run_id": "run"}
        for sha, partition in {"a" * 64: "0001", "b" * 64: "0002"}.items()
    }
    store = types.SimpleNamespace(manifest_of_sha=known.get)
    table = writers_table(store, {"chosen": pl.Series(["b" * 64, "a" * 64, "b" * 64, "gone"])}).value
    assert [label in table for label in ("response_improver[0001]", "response_improver[0002]")] == [True, True]
    assert table.count("chosen") == 2
    assert "gone" not in table
