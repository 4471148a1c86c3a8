"""The sensor that goes on by itself: what it asks for, and the reasons it gives when it does not."""

import dagster as dg
import pytest

from resources.settings import active_settings
from synpo_assets.automation import next_iteration, reason_to_wait
from synpo_assets.missing import asset_names
from synpo_assets.partitions import ITERATIONS
from synpo_assets.runs import asset_graph


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as ephemeral:
        yield ephemeral


def settings(**automation):
    return active_settings().model_copy(
        update={"automation": active_settings().automation.model_copy(update=automation)}
    )


def finish(instance, partition, metadata=None, without=()):
    """Reports a whole iteration (or, for None, all that is made once) as materialized."""
    for name in asset_names(asset_graph(), partitioned=partition is not None):
        if name not in without:
            instance.report_runless_asset_event(
                dg.AssetMaterialization(name, partition=partition, metadata=(metadata or {}).get(name, {}))
            )


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
    finish(instance, "0001", {"evaluation": {"win_rate_over_initial": 0.6}})
    request = tick(instance)
    assert request.partition_key == "0002"
    assert "initial_policy" not in {key.to_user_string() for key in request.asset_selection}


def test_of_a_half_finished_iteration_it_asks_for_the_rest(instance):
    finish(instance, None)
    finish(instance, "0001", without=("model_checkpoint", "evaluation"))
    asked = {key.to_user_string() for key in tick(instance).asset_selection}
    assert asked >= {"model_checkpoint", "evaluation", "policy"}
    assert "base_responses" not in asked


@pytest.mark.parametrize(("limits", "reason"), [
    ({}, "win_rate_over_initial is 0.4, less than 0.5"),
    ({"minimum": {"win_rate_over_previous": 0.5}}, "win_rate_over_previous is 0.3, less than 0.5"),
    ({"minimum": {"win_rate_over_initial_by_scorer": 0.95}}, "win_rate_over_initial_by_scorer is 0.9, less than 0.95"),
    ({"minimum": {}, "maximum": {"mean_margin": 1.0}}, "mean_margin is 2.5, more than 1"),
    ({"minimum": {"held_out_reward_gain": 0.1}}, "held_out_reward_gain was not measured"),
    # One figure is not enough: the win rate may rise while answers begin to loop and prompts grow alike.
    ({"minimum": {"win_rate_over_initial": 0.3, "win_rate_over_initial_low": 0.5}}, "win_rate_over_initial_low is 0.2, less"),
    ({"minimum": {}, "maximum": {"mean_repetition": 0.1}}, "mean_repetition is 0.3, more than 0.1"),
    ({"minimum": {}, "maximum": {"cut_share": 0.5}}, "cut_share is 0.7, more than 0.5"),
    ({"minimum": {}, "maximum": {"prompt_similarity": 0.15}}, "prompt_similarity is 0.2, more than 0.15"),
])  # fmt: skip
def test_the_gate_stops_it_and_it_says_why(instance, limits, reason):
    finish(instance, None)
    judged = {"win_rate_over_initial": 0.4, "win_rate_over_previous": 0.3, "win_rate_over_initial_by_scorer": 0.9}
    judged |= {"win_rate_over_initial_low": 0.2, "mean_repetition policy": 0.3, "cut_share policy": 0.7}
    others = {"preference_pairs": {"mean_margin": 2.5}, "prompt_diversity": {"mean_similarity synthetic": 0.2}}
    finish(instance, "0001", {"evaluation": judged, **others})
    skipped = tick(instance, **limits)
    assert isinstance(skipped, dg.SkipReason)
    assert skipped.skip_message.startswith(f"Stopped after iteration 1 by the gate: {reason}")


def test_it_stops_at_the_target(instance):
    finish(instance, None)
    finish(instance, "0001", {"evaluation": {"win_rate_over_initial": 0.9}})
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
