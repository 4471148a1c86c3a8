"""Asset checks on tables with known faults: what they say, per iteration, and what they hold up."""

import dataclasses
import json

import dagster as dg
import polars as pl
import pytest

from resources.judging.judge_choice import INDEPENDENT, TOOK_PART
from resources.storage.checkpoint_store import TRAINING_LOG
from synpo_assets.algorithm import stages_of
from synpo_assets.graph import history
from synpo_assets.graph.checks import CHOOSE_SAMPLES, MORE_PAIRS, checks_of
from synpo_assets.graph.metrics import Metric
from tests.nano import active_settings
from tests.stand_ins import ITERATIONS, measured, run, services_in, win_rates
from tests.stand_ins import instance as instance
from tests.test_loop import pairs


@pytest.fixture
def services(tmp_path):
    return services_in(tmp_path)


def evaluate(instance, services, asset, value, partition="0001", io_manager="tables", **limits):
    """Materializes a stand-in asset and its real checks; returns each check's evaluation by name."""
    settings = active_settings()
    settings = settings.model_copy(update={"checks": settings.checks.model_copy(update=limits)})

    @dg.asset(name=asset, partitions_def=ITERATIONS, io_manager_key=io_manager)
    def made(context: dg.AssetExecutionContext):
        return value(context) if callable(value) else value

    @dg.asset(partitions_def=ITERATIONS, deps=[made])
    def after() -> None: ...

    own = checks_of([stage for stage in stages_of(settings) if stage.name == asset], settings)
    services = dataclasses.replace(services, settings=settings)
    result = run([made, after, *own], instance, services, partition, raise_on_error=False)
    found = {evaluation.check_name: evaluation for evaluation in result.get_asset_check_evaluations()}
    assert {evaluation.partition for evaluation in found.values()} == {partition}
    return found, bool(result.asset_materializations_for_node("after"))


def failed_checks(instance, services, asset, partition):
    return history.failed_checks(instance, services.graph, asset, partition)


def figures(evaluation):
    return {name: entry.value for name, entry in evaluation.metadata.items()}


def with_texts(frame, chosen, rejected):
    sides = {"chosen": chosen, "rejected": rejected}
    return frame.with_columns(
        pl.Series(side, [[{"role": "assistant", "content": text}] for text in texts], dtype=frame.schema[side])
        for side, texts in sides.items()
    )


GOOD = ["A pan that is too hot burns the butter.", "Rivers bend where the bank is soft."]


def good_pairs(count=8):
    return with_texts(pairs(1, count), GOOD * (count // 2), GOOD[::-1] * (count // 2))


def test_good_pairs_pass_all_checks(instance, services):
    found, went_on = evaluate(instance, services, "preference_pairs", good_pairs())
    assert {name: evaluation.passed for name, evaluation in found.items()} == dict.fromkeys(
        ["enough_pairs", "no_empty_side", "score_margin", "length_ratio", "repetition"], True
    )
    assert went_on
    assert failed_checks(instance, services, "preference_pairs", "0001") == []


def test_too_few_pairs_block_what_follows_in_their_iteration_only(instance, services):
    found, went_on = evaluate(instance, services, "preference_pairs", good_pairs(2), min_pairs_share=0.5)
    assert not found["enough_pairs"].passed
    assert figures(found["enough_pairs"]) == {
        "pairs": 2,
        "least_allowed": 4.0,
        "setting": "checks.min_pairs_share",
        "remedy": MORE_PAIRS,
    }
    assert not went_on
    assert failed_checks(instance, services, "preference_pairs", "0001") == ["enough_pairs"]
    assert failed_checks(instance, services, "preference_pairs", "0002") == []
    _, went_on = evaluate(instance, services, "preference_pairs", good_pairs(2), min_pairs_share=0.25)
    assert went_on
    assert failed_checks(instance, services, "preference_pairs", "0001") == []


def test_an_empty_chosen_side_blocks(instance, services):
    frame = with_texts(pairs(1, 4), [*GOOD, " \n", "x"], [*GOOD, "a", "b"])
    found, went_on = evaluate(instance, services, "preference_pairs", frame)
    assert figures(found["no_empty_side"]) == {"empty_answers": 1}
    assert not went_on


@pytest.mark.parametrize(("check", "chosen", "limits"), [
    ("length_ratio", [text * 5 for text in GOOD], {}),
    ("repetition", ["tick tock " * 20, "no no no no no no no no"], {"max_length_ratio": 100.0}),
    ("score_margin", GOOD, {"min_mean_margin": 0.6}),
])  # fmt: skip
def test_questionable_pairs_warn_and_do_not_block(instance, services, check, chosen, limits):
    found, went_on = evaluate(
        instance, services, "preference_pairs", with_texts(pairs(1, 2), chosen, GOOD), min_pairs_share=0.0, **limits
    )
    assert not found[check].passed
    assert found[check].severity == dg.AssetCheckSeverity.WARN
    assert went_on


def test_prompts_that_grow_alike_or_repeat_earlier_ones_warn(instance, services):
    repeated = [Metric("dropped", 5, of="near_duplicate"), Metric("keyword_sets_used", 10)]
    measured(services, "synthetic_prompts", *repeated)
    varied = pl.DataFrame({"prompt": ["How do rivers bend?", "Name three salads.", "Why is ice slippery?"]})
    found, _ = evaluate(instance, services, "synthetic_prompts", varied)
    assert figures(found["few_near_duplicates"])["near_duplicate_rate"] == 0.5
    assert not found["few_near_duplicates"].passed
    assert found["varied_prompts"].passed
    alike = pl.DataFrame({"prompt": ["How do rivers bend?", "How do rivers bend here?", "How do rivers bend there?"]})
    measured(services, "synthetic_prompts", Metric("keyword_sets_used", 3), partition="0002")
    found, _ = evaluate(instance, services, "synthetic_prompts", alike, "0002")
    assert not found["varied_prompts"].passed
    assert found["few_near_duplicates"].passed


def checkpoint_with(value, log=()):
    def make(context):
        def build(directory):
            import torch
            from safetensors.torch import save_file

            (directory / "merged").mkdir()
            tensors = {"good": torch.ones(2, dtype=torch.bfloat16), "last": torch.tensor([1.0, value])}
            save_file(tensors, directory / "merged" / "model.safetensors")
            (directory / TRAINING_LOG).write_text("".join(json.dumps(entry) + "\n" for entry in log))

        return context.resources.checkpoints.create(
            context, build, parents={}, trained_on={}, settings={}, random_seed=0
        )[0]

    return make


@pytest.mark.parametrize(("value", "passes"), [(1.0, True), (float("nan"), False), (float("inf"), False)])
def test_weights_that_are_not_finite_block(services, instance, value, passes):
    found, went_on = evaluate(instance, services, "model_checkpoint", checkpoint_with(value), io_manager="checkpoints")
    assert found["finite_weights"].passed == went_on == passes
    assert figures(found["finite_weights"])["tensors_not_finite"] == (0 if passes else 1)


@pytest.mark.parametrize(("left", "passes"), [(1.0, True), (0.9, True), (0.89, False), (None, True)])
def test_an_update_that_readers_do_not_see_warns(services, instance, left, passes):
    measured(services, "model_checkpoint", Metric("surviving_update", left))
    found, went_on = evaluate(instance, services, "model_checkpoint", checkpoint_with(1.0), io_manager="checkpoints")
    assert found["update_survives"].passed == passes
    assert went_on
    assert ("Raise learning_rate" in figures(found["update_survives"]).get("remedy", "")) is not passes


@pytest.mark.parametrize(("accuracy", "above_limit", "said"), [
    (0.5, 0.0, []),
    (1.0, 9.0, []),
    (0.49, 0.0, ["the reward accuracy is 49.0%, below 50%"]),
    (0.5, -0.25, ["the argument of the loss's sigmoid is -4.25, below -4, where a pair pulls with 98.6% of its full weight"]),
    (0.25, -6.0, ["the reward accuracy is 25.0%, below 50%, and the argument of the loss's sigmoid is -10.00, below -4"]),
])  # fmt: skip
def test_a_saturated_training_warns_and_does_not_block(services, instance, accuracy, above_limit, said):
    loss = active_settings().preference_optimization.loss
    margin = loss.gamma - 4 + above_limit
    # What counts is the last quarter of the twelve steps: the others would give the opposite result.
    early = {"rewards/accuracies": 0.0, "rewards/margins": -99.0} if not said else {
        "rewards/accuracies": 1.0, "rewards/margins": 99.0}  # fmt: skip
    late = [{"rewards/accuracies": accuracy + part, "rewards/margins": margin + part} for part in (-0.125, 0, 0.125)]
    log = [*[early] * 9, *late, {"loss": 1.0}]
    found, went_on = evaluate(
        instance, services, "model_checkpoint", checkpoint_with(1.0, log), io_manager="checkpoints"
    )
    check = found["loss_not_saturated"]
    assert found["finite_weights"].passed
    assert went_on
    assert (check.passed, check.severity) == (not said, dg.AssetCheckSeverity.WARN)
    shown = figures(check)
    assert shown["reward_accuracy"] == pytest.approx(accuracy)
    assert shown["sigmoid_argument"] == pytest.approx(-4 + above_limit)
    (run,) = instance.get_runs()
    warnings = [entry.user_message for entry in instance.all_logs(run.run_id) if "is saturated" in entry.user_message]
    assert warnings == ([shown["warning"]] if said else [])
    assert ("warning" in shown) == bool(said)
    for text in said:
        assert text in shown["warning"]
        for name in ("model_checkpoint[0001]", "preferences.chosen_from: ranked_samples", "training.epochs",
                     "preference_optimization.training.learning_rate"):  # fmt: skip
            assert name in shown["warning"]


def test_a_training_that_logged_no_rewards_is_not_called_saturated(services, instance):
    found, _ = evaluate(
        instance, services, "model_checkpoint", checkpoint_with(1.0, [{"loss": 1.0}]), io_manager="checkpoints"
    )
    assert found["loss_not_saturated"].passed
    assert figures(found["loss_not_saturated"])["sigmoid_argument"] is None


@pytest.mark.parametrize(("asset", "setting"), [
    ("base_responses", "responses.sampling"), ("seed_responses", "responses.sampling"),
    ("refined_responses", "response_improver.sampling"), ("evaluation", "evaluation.sampling"),
    ("synthetic_prompts", "prompt_generator.sampling"),
])  # fmt: skip
@pytest.mark.parametrize("share", [0.1, 0.11])
def test_many_cut_answers_warn_and_the_setting_is_named(instance, services, asset, setting, share):
    measured(services, asset, Metric("cut_share", share, n=100), Metric("cut_share", 0.9, of="initial"))
    found, went_on = evaluate(instance, services, asset, pl.DataFrame({"prompt": ["Why is it so?", "What is tea?"]}))
    assert found["answers_ended"].passed == (share <= 0.1)
    warning = f"11.0% of the answers of {asset}[0001] were cut at the token limit: raise {setting}.max_new_tokens, or"
    assert (share <= 0.1) == (
        warning not in found["answers_ended"].metadata.get("warning", dg.TextMetadataValue("")).value
    )
    assert went_on


@pytest.mark.parametrize(("policy", "improver"), [(0.5, 0.4), (0.4, 0.5), (0.5, 0.5), (None, None)])
def test_rewrites_that_follow_fewer_rules_than_what_they_rewrote_warn(instance, services, policy, improver):
    shares = {"policy": policy, "improver": improver}.items()
    measured(services, "refined_responses", *(Metric("rules_followed_share", share, who, n=9) for who, share in shares))
    found, went_on = evaluate(instance, services, "refined_responses", pl.DataFrame({"prompt": ["What is tea?"]}))
    worse = policy == 0.5 and improver == 0.4
    assert found["rewrites_follow_rules"].passed is not worse
    assert figures(found["rewrites_follow_rules"]) == {
        "of_what_it_rewrote": policy, "of_its_rewrites": improver, "prompts_with_rules": 9,
        **({"remedy": CHOOSE_SAMPLES} if worse else {}),
    }  # fmt: skip
    assert went_on


def test_a_policy_that_loses_or_loops_warns(instance, services):
    measured(
        services, "evaluation", win_rates(0.0, INDEPENDENT), win_rates(1.0, TOOK_PART),
        Metric("mean_repetition", 0.75, of="candidate"), Metric("mean_repetition", 0.0, of="initial"),
    )  # fmt: skip
    found, went_on = evaluate(instance, services, "evaluation", pl.DataFrame({"prompt_id": ["prompt-1"]}))
    assert [found[name].passed for name in ("win_rate", "answers_without_loops")] == [False, False]
    shown = {"win_rate": 0.0, "by_the_scorer": 1.0, "least_allowed": 0.5, "setting": "checks.min_win_rate"}
    assert figures(found["win_rate"]) == shown
    assert figures(found["answers_without_loops"])["of_the_initial_policy"] == 0.0
    assert went_on
