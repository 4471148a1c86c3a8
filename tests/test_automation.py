"""The sensor that goes on by itself: what it asks for, and the reasons it gives when it does not."""

import dagster as dg
import pytest

from resources.settings.files import active_settings
from synpo_assets.cli.automation import next_iteration, reason_to_wait
from synpo_assets.cli.runs import asset_graph
from synpo_assets.graph.missing import asset_names
from synpo_assets.graph.partitions import ITERATIONS


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as ephemeral:
        yield ephemeral


def settings(**automation):
    return active_settings().model_copy(
        update={"automation": active_settings().automation.model_copy(update=automation)}
    )


def finish(instance, partition, without=(), **metadata):
    """Reports a whole iteration, promoted if nothing else is said (or, for None, all that is made once), as materialized."""
    metadata = {"promotion": {"promoted": True}} | metadata
    for name in asset_names(asset_graph(), partitioned=partition is not None):
        if name not in without:
            event = dg.AssetMaterialization(name, partition=partition, metadata=metadata.get(name, {}))
            instance.report_runless_asset_event(event)


def tick(instance, **automation):
    from definitions import defs

    context = dg.build_sensor_context(
        instance=instance,
        resources={"settings": settings(**automation)},
        repository_def=defs.get_repository_def(),
    )
    return next_iteration(context)


def test_it_is_off_until_it_is_switched_on():
    from definitions import defs

    sensor = defs.resolve_sensor_def("next_iteration")
    assert sensor.default_status == dg.DefaultSensorStatus.STOPPED


def test_on_an_empty_home_it_asks_for_iteration_1_with_all_that_is_made_once(instance):
    request = tick(instance)
    assert request.partition_key == "0001"
    asked = {key.to_user_string() for key in request.asset_selection}
    assert {"initial_policy", "reward_model", "judge_model", "policy", "evaluation"} <= asked


def test_after_an_iteration_it_asks_for_the_next(instance):
    finish(instance, None)
    finish(instance, "0001")
    request = tick(instance)
    assert request.partition_key == "0002"
    assert "initial_policy" not in {key.to_user_string() for key in request.asset_selection}


def test_of_a_half_finished_iteration_it_asks_for_the_rest(instance):
    finish(instance, None)
    finish(instance, "0001", without=("model_checkpoint", "evaluation", "promotion"))
    asked = {key.to_user_string() for key in tick(instance).asset_selection}
    assert asked >= {"model_checkpoint", "evaluation", "promotion", "policy"}
    assert "base_responses" not in asked


def test_it_stops_where_the_newest_checkpoint_was_not_promoted_and_says_why(instance):
    finish(instance, None)
    verdict = "model_checkpoint[0001] was not promoted to policy[0002]: mean_repetition is 0.4, more than 0.2."
    finish(instance, "0001", promotion={"promoted": False, "verdict": verdict})
    skipped = tick(instance)
    assert isinstance(skipped, dg.SkipReason)
    assert skipped.skip_message.startswith(f"Stopped after iteration 1: {verdict} Mend the cause")


def test_it_stops_where_an_older_checkpoint_was_promoted(instance):
    finish(instance, None)
    finish(
        instance, "0001", promotion={"promoted": True, "checkpoint_sha": "a" * 64}, model_checkpoint={"sha": "b" * 64}
    )
    assert "promotion[0001] is about aaaaaaaaaaaaaaaa, but" in tick(instance).skip_message


def test_it_stops_at_the_target(instance):
    finish(instance, None)
    finish(instance, "0001")
    assert "Stopped: iteration 1 is finished" in tick(instance, target_iterations=1).skip_message


@pytest.mark.parametrize(("status", "reason"), [
    (dg.DagsterRunStatus.STARTED, "is at work"),
    (dg.DagsterRunStatus.FAILURE, "ended as FAILURE"),
    (dg.DagsterRunStatus.CANCELED, "ended as CANCELED"),
])  # fmt: skip
def test_it_waits_for_runs_and_does_not_repeat_failed_ones(instance, status, reason):
    job = dg.Definitions([dg.AssetSpec("anything")]).resolve_implicit_global_asset_job_def()
    instance.create_run_for_job(job, tags=ITERATIONS.get_tags_for_partition_key("0001"), status=status)
    assert reason in reason_to_wait(instance, settings(), 1)
