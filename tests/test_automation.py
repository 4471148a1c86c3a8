"""The sensor that goes on by itself: what it asks for, and the reasons it gives when it does not."""

import dagster as dg
import polars as pl
import pytest
from dagster._core.storage.tags import PARTITION_NAME_TAG

from resources.storage.files import json_sha256, write_atomically
from resources.storage.manifests import Manifest
from synpo_assets.cli.automation import JOBS, next_iteration, reason_to_wait
from synpo_assets.graph.history import never_began
from synpo_assets.graph.metrics import Metric
from synpo_assets.graph.missing import asset_names
from tests.nano import active_settings, write_settings
from tests.stand_ins import EMPTY_JOB, begun_run, measured, services_in
from tests.stand_ins import instance as instance


@pytest.fixture
def services(tmp_path):
    return services_in(tmp_path)


def sha_of(weights):
    """The sha of a checkpoint, given that of its only file."""
    return json_sha256({"model.safetensors": weights})


def finish(instance, services, partition, without=(), promoted=1.0, judged="a" * 64, made="a" * 64):
    """Reports a whole iteration, promoted if nothing else is said (or, for None, all that is made once), as materialized."""
    for name in asset_names(services.graph, partitioned=partition is not None):
        if name not in without:
            instance.report_runless_asset_event(dg.AssetMaterialization(name, partition=partition))
    if partition is not None:
        promotion = Metric("promoted", promoted, of="candidate", checkpoint_sha=sha_of(judged))
        measured(services, "promotion", promotion, partition=partition)
        manifest = Manifest(
            asset="model_checkpoint", partition=partition, sha=sha_of(made), weights="merged", run_id="",
            files={"model.safetensors": {"bytes": 1, "sha256": made}}, parents={}, trained_on={}, settings={},
        )  # fmt: skip
        folder = services.home / "checkpoints"
        pointer = f'{{"directory": "{manifest.directory}"}}'
        write_atomically(folder / "model_checkpoint" / f"{partition}.json", pointer.encode())
        write_atomically(folder / manifest.directory / "manifest.json", manifest.model_dump_json().encode())


def tick(instance, services, **automation):
    from definitions import build

    settings = active_settings()
    settings = settings.model_copy(update={"automation": settings.automation.model_copy(update=automation)})
    definitions, services = build(settings, services.home)
    context = dg.build_sensor_context(
        instance=instance, resources={"experiment": services}, repository_def=definitions.get_repository_def()
    )
    return next_iteration(context)


def test_it_is_off_until_it_is_switched_on():
    from definitions import defs

    sensor = defs.resolve_sensor_def("next_iteration")
    assert sensor.default_status == dg.DefaultSensorStatus.STOPPED


def test_on_an_empty_home_it_asks_for_iteration_1_with_all_that_is_made_once(instance, services):
    request = tick(instance, services)
    assert request.partition_key == "0001"
    asked = {key.to_user_string() for key in request.asset_selection}
    assert {"initial_policy", "reward_model", "judge_model", "policy", "evaluation"} <= asked


def test_after_an_iteration_it_asks_for_the_next(instance, services):
    finish(instance, services, None)
    finish(instance, services, "0001")
    request = tick(instance, services)
    assert request.partition_key == "0002"
    assert "initial_policy" not in {key.to_user_string() for key in request.asset_selection}


def test_of_a_half_finished_iteration_it_asks_for_the_rest(instance, services):
    finish(instance, services, None)
    finish(instance, services, "0001", without=("model_checkpoint", "evaluation", "promotion"))
    asked = {key.to_user_string() for key in tick(instance, services).asset_selection}
    assert asked >= {"model_checkpoint", "evaluation", "promotion", "policy"}
    assert "base_responses" not in asked


def test_it_stops_where_the_newest_checkpoint_was_not_promoted_and_says_why(instance, services):
    finish(instance, services, None)
    verdict = "model_checkpoint[0001] was not promoted to policy[0002]: mean_repetition is 0.4, more than 0.2."
    finish(instance, services, "0001", promoted=0.0)
    row = {"metric": "mean_repetition", "passed": False, "reason": "mean_repetition is 0.4, more than 0.2"}
    services.tables.write("promotion", "0001", pl.DataFrame([row]))
    skipped = tick(instance, services)
    assert isinstance(skipped, dg.SkipReason)
    assert skipped.skip_message.startswith(f"Stopped after iteration 1: {verdict} Mend the cause")


def test_where_an_older_checkpoint_was_promoted_it_asks_for_another_promotion(instance, services):
    finish(instance, services, None)
    finish(instance, services, "0001", made="b" * 64)
    request = tick(instance, services)
    asked = {key.to_user_string() for key in request.asset_selection}
    assert (request.partition_key, "promotion" in asked, "model_checkpoint" in asked) == ("0001", True, False)


def test_it_stops_at_the_target(instance, services):
    finish(instance, services, None)
    finish(instance, services, "0001")
    assert "Stopped: iteration 1 is finished" in tick(instance, services, target_iterations=1).skip_message


@pytest.mark.parametrize(("status", "reason"), [
    (dg.DagsterRunStatus.STARTED, "is at work"),
    (dg.DagsterRunStatus.FAILURE, "ended as FAILURE"),
    (dg.DagsterRunStatus.CANCELED, "ended as CANCELED"),
])  # fmt: skip
def test_it_waits_for_runs_and_does_not_repeat_failed_ones(instance, services, status, reason):
    begun_run(instance, status, {PARTITION_NAME_TAG: "0001"})
    assert reason in reason_to_wait(instance, services, 1)


@pytest.mark.parametrize(("step", "judged_since", "goes_on"), [
    ("policy", True, True), ("policy", False, False), ("keyword_sets", True, False),
])  # fmt: skip
def test_a_run_that_the_gate_kept_out_does_not_hold_it_once_the_gate_was_asked_again(
    instance, services, step, judged_since, goes_on
):
    """A backfill launches iteration 2 although the gate refuses M_1."""
    finish(instance, services, None)
    finish(instance, services, "0001")
    refused = begun_run(instance, dg.DagsterRunStatus.STARTED, {PARTITION_NAME_TAG: "0002"}, step)
    instance.report_run_failed(refused)
    if judged_since:
        instance.report_runless_asset_event(dg.AssetMaterialization("promotion", partition="0001"))
    assert (reason_to_wait(instance, services, 2) is None) == goes_on


def test_a_run_that_ended_before_any_step_does_not_hold_it(instance, services):
    run = instance.create_run_for_job(EMPTY_JOB, tags={PARTITION_NAME_TAG: "0001"}, status=dg.DagsterRunStatus.FAILURE)
    assert reason_to_wait(instance, services, 1) is None
    assert never_began(instance, run.run_id)


def test_it_waits_while_the_settings_are_wrong_and_says_what_is_wrong(instance, services):
    write_settings(services.home / "settings.yaml", {"preset": "laptop", "max_iterations": "two"})
    skipped = tick(instance, services)
    assert "`max_iterations` is 'two'" in skipped.skip_message


def test_jobs_stand_and_speak_in_the_order_of_use():
    """The UI sorts them by name."""
    said = [(job.name, job.description.split()[0].strip(",:")) for job in sorted(JOBS, key=lambda job: job.name)]
    assert said == [("foundation", "First"), ("iteration", "Then"), ("synpo", "Nothing")]
