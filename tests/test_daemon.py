"""The loop in the UI with its real daemon: backfills, staleness, cancellation, automation. `pytest -n 0 -m slow`."""

import itertools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
import yaml

from definitions import build
from tests.conftest import HOME
from tests.nano import active_settings, nano_settings, write_settings
from tests.test_structure import ROOT
from tests.ui import processes_of, running_ui, wait_for

pytestmark = pytest.mark.slow
ITERATIONS = ["0001", "0002", "0003"]


@pytest.fixture(scope="module")
def ui(tmp_path_factory, nano_model):
    """A new home and its UI; the tests below follow one another on it."""
    home = tmp_path_factory.mktemp("daemon") / "home"
    home.mkdir()
    write_settings(home / "settings.yaml", nano_settings(nano_model) | {"max_iterations": 3})
    with running_ui(home, quick=True) as running:
        yield running


def change_settings(ui, **sections):
    file = ui.home / "settings.yaml"
    values = yaml.safe_load(file.read_text())
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes} if isinstance(changes, dict) else changes
    write_settings(file, values)
    ui.reload()


def runs_of(ui, backfill):
    """Those of a backfill as they began, each when the one before it had ended."""
    runs = sorted(ui.runs(tags=[{"key": "dagster/backfill", "value": backfill}]), key=lambda run: run["startTime"])
    for earlier, later in itertools.pairwise(runs):
        assert earlier["endTime"] <= later["startTime"]
    return runs


def order(runs):
    return [(run["partition"], run["status"]) for run in runs]


def steps_of(run):
    return [step["stepKey"] for step in run["stepStats"]]


def test_a_backfill_of_everything_stops_cleanly_where_an_iteration_fails(ui):
    """Once-only assets, then 0001; 0002 fails; 0003 ends with the sentence and trains on nothing stale."""
    in_the_way = ui.home / "checkpoints" / "response_improver" / "0002"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("a file where a folder has to be")
    backfill = ui.backfill(ITERATIONS)
    assert ui.wait_for_backfill(backfill) == "COMPLETED_FAILED"
    runs = runs_of(ui, backfill)
    assert order(runs) == [(None, "SUCCESS"), ("0001", "SUCCESS"), ("0002", "FAILURE"), ("0003", "FAILURE")]
    _, first, _, last = runs
    assert "boosting_report" in steps_of(first)
    message = ui.failure_messages(last["id"])
    assert "The newest attempt to make model_checkpoint[0002] ended without it" in message
    assert "run that iteration again, then this one" in message
    assert steps_of(last) == ["policy"]
    in_the_way.unlink()


def test_the_backfill_again_makes_everything_in_order_with_one_run_per_iteration(ui):
    """First what is made once, then the iterations that failed, each with its report, then the data set of all.

    What is made once comes out as it was, so that the iteration before them stays fresh.
    """
    backfill = ui.backfill(ITERATIONS[1:])
    assert ui.wait_for_backfill(backfill) == "COMPLETED_SUCCESS"
    runs = runs_of(ui, backfill)
    assert [run["partition"] for run in runs] == [None, *ITERATIONS[1:], None]
    for run in runs[1:-1]:
        assert "boosting_report" in steps_of(run)
    # What spans all iterations comes last; publishing is a dry run, and without settings for them benchmarks are empty.
    assert sorted(asset["path"][0] for asset in runs[-1]["assetSelection"]) == ["published_dataset"]
    assert set(ui.stale("model_checkpoint", ITERATIONS).values()) == {"FRESH"}


def test_steps_on_the_gpu_never_overlap(ui):
    """Over all runs so far, whichever iteration and backfill they belong to."""
    definitions, _ = build(active_settings(), HOME)
    on_gpu = {
        asset.key.to_user_string() for asset in definitions.assets if asset.is_executable and asset.op.pool == "gpu"
    }
    spans = sorted(
        (step["startTime"], step["endTime"], step["stepKey"])
        for run in ui.runs() for step in run["stepStats"]
        # A step that failed waited between its tries, without the GPU.
        if step["stepKey"] in on_gpu and step["status"] == "SUCCESS"
    )  # fmt: skip
    assert len(spans) > 20
    for earlier, later in itertools.pairwise(spans):
        assert earlier[1] <= later[0], (earlier, later)


def test_one_iteration_again_with_other_settings_makes_later_ones_stale_and_reuses_shards(ui):
    assert set(ui.stale("model_checkpoint", ITERATIONS).values()) == {"FRESH"}
    before = ui.metadata("model_checkpoint", "0002")["sha"]
    change_settings(ui, preference_optimization={"loss": {"beta": 6.0}})
    assert set(ui.stale("model_checkpoint", ITERATIONS).values()) == {"STALE"}
    assert set(ui.stale("base_responses", ITERATIONS).values()) == {"FRESH"}
    partitioned = [name for name, is_partitioned in ui.assets().items() if is_partitioned]
    assert ui.wait_for_backfill(ui.backfill(["0002"], partitioned)) == "COMPLETED_SUCCESS"
    after = ui.metadata("model_checkpoint", "0002")["sha"]
    assert after != before
    for asset in ("base_responses", "synthetic_prompts", "refined_responses"):
        assert ui.metadata(asset, "0002")["generated_tokens"] == 0, asset
    assert ui.stale("model_checkpoint", ["0002"]) == {"0002": "FRESH"}
    assert ui.stale("base_responses", ITERATIONS) == {"0001": "FRESH", "0002": "FRESH", "0003": "STALE"}


def test_dg_launch_makes_one_iteration(ui):
    """The one that is stale since the iteration before it was made again: of what that became."""
    checkpoint = ui.metadata("model_checkpoint", "0002")["sha"]
    assert ui.metadata("base_responses", "0003")["checkpoint_sha"] != checkpoint
    result = subprocess.run(
        [str(Path(sys.executable).with_name("dg")), "launch", "--job", "iteration", "--partition", "0003"],
        capture_output=True, text=True, cwd=ROOT, timeout=600,
        env={**os.environ, "SYNPO_HOME": str(ui.home), "DAGSTER_HOME": str(ui.home)},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    newest = [run for run in ui.runs() if run["partition"] == "0003"][-1]
    assert newest["status"] == "SUCCESS"
    assert {*steps_of(newest)} >= {"policy", "model_checkpoint", "boosting_report"}
    assert ui.metadata("policy", "0003")["checkpoint_sha"] == checkpoint
    assert ui.metadata("base_responses", "0003")["checkpoint_sha"] == checkpoint
    assert ui.stale("base_responses", ["0003"]) == {"0003": "FRESH"}


def test_the_links_of_a_materialization_lead_to_what_made_it(ui):
    about, made = ui.metadata("base_responses", "0003"), ui.metadata("model_checkpoint", "0002")
    assert about["checkpoint_asset"] == {"path": ["model_checkpoint"]}
    assert about["checkpoint_run"] == made["run"]
    assert about["checkpoint_page"] == "/assets/model_checkpoint?view=partitions&partition=0002"
    assert about["checkpoint_sha"] == made["sha"]
    trained_on = ui.metadata("model_checkpoint", "0003")["trained_on"]
    assert re.findall(r"\[(preference_pairs\[\d+\])\]\((\S+)\)", trained_on) == [
        (f"preference_pairs[{key}]", f"/assets/preference_pairs?view=partitions&partition={key}") for key in ITERATIONS
    ]


def test_a_second_run_of_the_same_iteration_waits_for_the_first(ui):
    first, second = (ui.launch("0001", ["policy", "keyword_sets"]) for _ in range(2))
    assert {ui.wait_for_run(first), ui.wait_for_run(second)} == {"SUCCESS"}
    one, other = sorted((run for run in ui.runs() if run["id"] in (first, second)), key=lambda run: run["startTime"])
    assert one["endTime"] <= other["startTime"]


def working_processes(home):
    """Those of the home, except the trackers that Python keeps beside a server."""
    return {process for process, command in processes_of(home).items() if "resource_tracker" not in command}


def test_a_cancelled_run_ends_all_its_processes_within_30_seconds_and_leaves_nothing_half_made(ui):
    before, checkpoint = working_processes(ui.home), ui.metadata("model_checkpoint", "0001")
    run = ui.launch("0001", ["model_checkpoint"], {"preference_optimization.training.epochs": 2000})
    training = ui.home / "checkpoints" / "model_checkpoint"
    wait_for(lambda: list(training.glob(".0001.*.tmp")), 120)
    time.sleep(3)
    started = time.monotonic()
    ui.terminate(run)
    assert ui.wait_for_run(run, 30) == "CANCELED"
    wait_for(lambda: working_processes(ui.home) <= before, max(1.0, 30 - (time.monotonic() - started)))
    assert list(training.glob(".*tmp")) == []
    assert ui.metadata("model_checkpoint", "0001") == checkpoint
    # With the setting that it was made with, so that what was measured of it still holds.
    again = ui.launch("0001", ["model_checkpoint"], {"preference_optimization.loss.beta": 2.0})
    assert ui.wait_for_run(again) == "SUCCESS", "the slot of the pool was not given back"
    assert ui.metadata("model_checkpoint", "0001")["sha"] == checkpoint["sha"]


def test_another_iteration_is_a_setting_and_the_sensor_makes_it_and_stops_at_the_target(ui):
    change_settings(ui, max_iterations=4)
    sensor = {
        "repositoryLocationName": ui.location(),
        "repositoryName": "__repository__",
        "sensorName": "next_iteration",
    }
    ui.query(
        """mutation S($selector: SensorSelector!) { startSensor(sensorSelector: $selector) { __typename
             ... on PythonError { message } } }""",
        selector=sensor,
    )  # fmt: skip
    made = wait_for(lambda: [run for run in ui.runs() if run["partition"] == "0004"], 240)
    assert ui.wait_for_run(made[0]["id"]) == "SUCCESS"

    def last_reason():
        found = ui.query(
            """query T($selector: SensorSelector!) { sensorOrError(sensorSelector: $selector) { ... on Sensor {
                 sensorState { ticks(limit: 1) { status skipReason error { message } } } } } }""",
            selector=sensor,
        )["sensorOrError"]["sensorState"]["ticks"]  # fmt: skip
        return found and found[0]["skipReason"]

    reason = wait_for(lambda: "Stopped" in (last_reason() or "") and last_reason(), 120)
    assert reason == "Stopped: iteration 4 is finished, which is the target (automation.target_iterations)."
    assert pl.read_parquet(ui.home / "tables" / "evaluation" / "0004.parquet").height == 6


def test_the_next_iteration_waits_for_corrected_limits_if_a_checkpoint_was_not_promoted(ui):
    """The sensor, still switched on, has it judged again once they are corrected."""
    change_settings(ui, gate={"minimum": {"pairs_kept": 1000}})
    assert ui.wait_for_run(ui.launch("0003", ["promotion"])) == "SUCCESS"
    refused = ui.launch("0004", ["policy"])
    assert ui.wait_for_run(refused) == "FAILURE"
    verdict = ui.metadata("promotion", "0003")["verdict"]
    assert verdict.startswith("model_checkpoint[0003] was not promoted to policy[0004]: pairs_kept is ")
    assert f"{verdict} Mend the cause" in ui.failure_messages(refused)
    change_settings(ui, gate={"minimum": {}})
    wait_for(lambda: ui.metadata("promotion", "0003")["verdict"] != verdict, 180)
    assert ui.metadata("policy", "0004")["reported_by"] == "promotion[0003]"
    assert ui.wait_for_run(ui.runs()[-1]["id"]) == "SUCCESS"


def test_the_launchpad_and_a_backfill_change_settings_for_their_runs_alone(ui):
    """Needs no model, so that it can be run by itself."""
    if not ui.runs():
        assert ui.wait_for_run(ui.launch(None, ["initial_policy", "seed_pairs", "keyword_pool"])) == "SUCCESS"
    draw, fewer = ["policy", "keyword_sets"], {"prompt_generator.max_overdraw": 2}
    assert ui.wait_for_run(ui.launch("0001", draw, fewer)) == "SUCCESS"
    assert ui.metadata("keyword_sets", "0001")["made_with"] == "prompt_generator.max_overdraw 2 instead of 4"
    assert ui.stale("keyword_sets", ["0001"]) == {"0001": "STALE"}
    assert ui.wait_for_run(ui.launch("0001", draw)) == "SUCCESS"
    assert "made_with" not in ui.metadata("keyword_sets", "0001")
    assert ui.stale("keyword_sets", ["0001"]) == {"0001": "FRESH"}
    assert ui.wait_for_backfill(ui.backfill(["0001"], draw, fewer)) == "COMPLETED_SUCCESS"
    assert ui.stale("keyword_sets", ["0001"]) == {"0001": "STALE"}
    before = len(ui.runs())
    with pytest.raises(AssertionError, match="is not a setting; did you mean `max_overdraw`"):
        ui.launch("0001", draw, {"prompt_generator.max_overdrw": 2})
    assert len(ui.runs()) == before


def test_wrong_settings_keep_the_graph_start_no_run_and_are_mended_by_a_reload(ui):
    """In the file, during the reload and after it; a run that was launched before ends at once and counts for nothing."""
    file, assets = ui.home / "settings.yaml", set(ui.assets())
    valid, sentence = file.read_text(), "prompt_generator.min_words is larger than max_words: no prompt could pass."
    values = yaml.safe_load(valid)
    launched = ui.launch(None, ["seed_pairs"])
    write_settings(file, values | {"prompt_generator": values["prompt_generator"] | {"min_words": 99, "max_words": 9}})
    assert ui.wait_for_run(launched) == "FAILURE"
    assert [message for message in ui.events(launched) if message and sentence in message]
    assert next(run for run in ui.runs() if run["id"] == launched)["stepStats"] == []
    runs = len(ui.runs())
    with pytest.raises(AssertionError, match=sentence):
        ui.launch(None, ["seed_pairs"])
    ui.reload()
    assert set(ui.assets()) == assets
    with pytest.raises(AssertionError, match=sentence):
        ui.launch(None, ["seed_pairs"])
    assert ui.wait_for_backfill(ui.backfill(["0001"], ["policy", "keyword_sets"])) == "FAILED"
    assert len(ui.runs()) == runs
    _, said = wait_for(lambda: (found := ui.check("settings")) and not found[0] and found, 60)
    assert sentence in said
    file.write_text(valid)
    ui.reload()
    wait_for(lambda: ui.check("settings")[0], 60)
    assert ui.wait_for_run(ui.launch(None, ["seed_pairs"])) == "SUCCESS"
