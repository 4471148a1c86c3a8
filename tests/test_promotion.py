"""The gate on real Dagster instances: what is promoted, what is not and why, and what the next iteration says to it."""

import dataclasses
import logging
import shutil
from typing import get_args

import dagster as dg
import numpy as np
import polars as pl
import pytest
import yaml

from resources.common.errors import DamageError, FinalError
from resources.judging.judge_choice import INDEPENDENT, TOOK_PART
from resources.settings.evaluation import Gate, GateMetric
from resources.settings.files import load_settings
from resources.storage.checkpoint_store import CheckpointError, CheckpointStore
from synpo_assets.algorithm import stages_of
from synpo_assets.evaluation.promotion import gate_metrics, lowest_rates, promotion, training_metrics
from synpo_assets.graph.evaluation_schemas import Promotion
from synpo_assets.graph.history import data_version_of, input_version_of
from synpo_assets.graph.metrics import Metric, record, recorded
from synpo_assets.graph.missing import asset_names, missing_assets, outdated_assets
from synpo_assets.graph.tables import check
from synpo_assets.method.gate import gate_power, gate_rows
from synpo_assets.method.judging import BOTH_ENDED
from synpo_assets.method.length_control import length_controlled_win_rate
from synpo_assets.method.outcomes import win_rate_interval
from synpo_assets.stages.loop import promotion_refusal
from tests.conftest import synpo
from tests.nano import write_settings
from tests.stand_ins import instance as instance
from tests.stand_ins import judged_answers, measured, run, services_in, shown, win_rates
from tests.test_loop import enter, evaluation_asset, make, model_checkpoint_asset, with_gate
from tests.test_loop import services as services

LOOPS = [Metric("mean_repetition", 0.4, of="candidate")]
DATA_VERSION = "dagster/data_version"
PROMPTS_READ = "dagster/input_data_version/synthetic_prompts"
REFUSED = "model_checkpoint[0001] was not promoted to policy[0002]: "


def judge(instance, services, **limits):
    """Materializes promotion[0001] under these limits and returns its table and its metadata."""
    result = run([promotion], instance, with_gate(services, **limits), "0001")
    assert result.success
    return result.output_for_node("promotion"), shown(instance, "promotion", "0001")


def gain(services, metric, value):
    """What a measurement of the current M_t says of its gain over M_0."""
    sha = services.checkpoints.current("model_checkpoint", "0001").sha
    return Metric(metric, value, of="candidate", over="initial", checkpoint_sha=sha)


def test_several_metrics_are_judged_and_each_is_shown_with_its_limits(instance, services):
    make(instance, services, metrics=LOOPS)
    measured(services, "instruction_following", gain(services, "verifiable_gain", -0.25))
    table, about = judge(
        instance, services, minimum={"win_rate_over_initial": 0.55, "verifiable_rate_gain": -0.05},
        maximum={"mean_repetition": 0.2, "win_rate_over_initial": 0.9},
    )  # fmt: skip
    assert check(Promotion, table) is None
    assert table.select("metric", "value", "minimum", "maximum", "passed").rows() == [
        ("win_rate_over_initial", 0.6, 0.55, 0.9, True),
        ("verifiable_rate_gain", -0.25, -0.05, None, False),
        ("mean_repetition", 0.4, None, 0.2, False),
    ]
    reasons = ["verifiable_rate_gain is -0.25, less than -0.05", "mean_repetition is 0.4, more than 0.2"]
    assert table["reason"].to_list() == [None, *reasons]
    assert about["promoted of candidate"] == 0
    assert about["verdict"] == f"{REFUSED}{'; '.join(reasons)}."


@pytest.mark.parametrize(("before", "after", "limit"), [(0.40, 0.35, "minimum"), (0.1, 0.4, "maximum")])
def test_a_gain_that_is_equal_to_its_limit_passes(instance, services, before, after, limit):
    """In binary fractions 0.35 - 0.40 is less than -0.05, and 0.4 - 0.1 more than 0.3."""
    make(instance, services)
    measured(services, "instruction_following", gain(services, "verifiable_gain", after - before))
    table, about = judge(instance, services, **{limit: {"verifiable_rate_gain": round(after - before, 2)}})
    assert table["reason"].to_list() == [None]
    assert about["promoted of candidate"] == 1


def test_without_limits_everything_is_promoted_and_the_table_is_empty(instance, services):
    make(instance, services, metrics=LOOPS)
    table, about = judge(instance, services)
    assert check(Promotion, table) is None
    assert table.is_empty()
    assert about["verdict"] == "model_checkpoint[0001] was promoted to policy[0002]: the gate has no limits."


def test_what_is_not_promoted_is_not_reported_and_the_next_iteration_says_why(instance, services):
    result = make(instance, with_gate(services, maximum={"mean_repetition": 0.2}), metrics=LOOPS)
    assert result.success, "the verdict is data, not a failure"
    warned = [entry.user_message for entry in instance.all_logs(result.run_id) if entry.level == logging.WARNING]
    assert warned == [f"{REFUSED}mean_repetition is 0.4, more than 0.2."]
    assert instance.get_materialized_partitions(dg.AssetKey("policy")) == set()
    with pytest.raises(CheckpointError) as error:
        enter(instance, services, "0002")
    said = str(error.value)
    assert f"{REFUSED}mean_repetition is 0.4, more than 0.2. Mend the cause" in said
    assert "correct the limits in the section `gate` of the settings and materialize promotion[0001] again" in said
    judge(instance, services, maximum={"mean_repetition": 0.5})
    made = enter(instance, services, "0002")
    assert data_version_of(instance, "policy", "0002") == made.sha[:16]


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_metric_that_is_missing_does_not_pass(instance, services, value):
    make(instance, services, metrics=[Metric("mean_repetition", value, of="candidate")])
    table, about = judge(instance, services, maximum={"mean_repetition": 0.5, "prompt_similarity_to_seed": 2.0})
    assert check(Promotion, table) is None
    assert about["verdict"] == (
        f"{REFUSED}mean_repetition was not measured; prompt_similarity_to_seed was not measured."
    )


def test_an_evaluation_of_an_older_checkpoint_is_not_judged(instance, services):
    make(instance, services)
    judged = shown(instance, "promotion", "0001")
    run(model_checkpoint_asset("M_1 again"), instance, services, "0001")
    made = services.checkpoints.current("model_checkpoint", "0001")
    with pytest.raises(FinalError) as error:
        judge(instance, services)
    assert f"evaluation[0001] is about {judged['checkpoint_sha'][:16]}" in str(error.value)
    assert f"model_checkpoint[0001] is {made.sha[:16]} by now: materialize evaluation[0001] again" in str(error.value)
    run([evaluation_asset()], instance, services, "0001")
    assert judge(instance, services)[1]["checkpoint_sha"] == made.sha
    assert enter(instance, services, "0002") == made


@pytest.mark.parametrize("asset", ["instruction_following", "gold_comparison"])
def test_another_measurement_of_an_older_checkpoint_is_not_judged(instance, services, asset):
    """Even with a new evaluation: the gate would judge M_t by the figures of the model before it."""
    make(instance, services)
    own = gain(services, "verifiable_gain", 0.1)
    measured(services, asset, own)
    assert judge(instance, services)[1]["promoted of candidate"] == 1
    measured(services, asset, dataclasses.replace(own, checkpoint_sha="f" * 64))
    with pytest.raises(FinalError, match=rf"{asset}\[0001\] is about ffff.*: materialize {asset}\[0001\] again"):
        judge(instance, services)


def test_pairs_that_the_checkpoint_was_not_trained_on_are_not_judged(instance, services):
    """Else M_t would be promoted for the pairs of a model that does not exist yet."""

    def report_pairs(version, margin):
        event = dg.AssetMaterialization("preference_pairs", partition="0001", tags={DATA_VERSION: version})
        instance.report_runless_asset_event(event)
        measured(services, "preference_pairs", Metric("mean_margin", margin))

    report_pairs("old", 0.5)
    make(instance, services, trained_on={"preference_pairs[0001]": "old"})
    limits = {"minimum": {"mean_margin": 1.0}}
    assert judge(instance, services, **limits)[1]["promoted of candidate"] == 0
    report_pairs("new", 2.0)
    with pytest.raises(FinalError) as error:
        judge(instance, services, **limits)
    assert str(error.value) == (
        "model_checkpoint[0001] was trained on version old of preference_pairs[0001], which has version new by now: "
        "materialize preference_history[0001], model_checkpoint[0001] and evaluation[0001] again."
    )
    make(instance, services, text="M_1 again", trained_on={"preference_pairs[0001]": "new"})
    assert judge(instance, services, **limits)[1]["promoted of candidate"] == 1


def test_the_diversity_of_prompts_that_were_not_answered_is_not_judged_by(instance, services):
    make(instance, services)

    def report_made_from(asset, version):
        event = dg.AssetMaterialization(asset, partition="0001", tags={PROMPTS_READ: version})
        instance.report_runless_asset_event(event)
        measured(services, asset, Metric("mean_similarity", 0.2, of="synthetic"))

    for asset in ("base_responses", "prompt_diversity"):
        report_made_from(asset, "old")
    limits = {"maximum": {"prompt_similarity": 0.5}}
    assert judge(instance, services, **limits)[1]["promoted of candidate"] == 1
    report_made_from("prompt_diversity", "new")
    with pytest.raises(
        FinalError,
        match=r"another version of synthetic_prompts\[0001\] than base_responses\[0001\] answers: materialize",
    ):
        judge(instance, services, **limits)
    assert judge(instance, services)[1]["promoted of candidate"] == 1, "no limit is about prompts"


def test_versions_are_recorded_by_which_the_gate_knows_its_data(nano_run):
    store = CheckpointStore(str(nano_run.home / "checkpoints"))
    with dg.DagsterInstance.from_config(str(nano_run.home)) as persistent:
        for partition in ("0001", "0002"):
            learned = store.current("model_checkpoint", partition).manifest["trained_on"]
            version = data_version_of(persistent, "preference_pairs", partition)
            assert learned[f"preference_pairs[{partition}]"] == version
            read = [
                input_version_of(persistent, asset, partition, "synthetic_prompts")
                for asset in ("prompt_diversity", "base_responses")
            ]
            assert None not in read
            assert len(set(read)) == 1


def test_without_an_evaluation_there_is_nothing_to_judge(instance, services):
    make(instance, services)
    shutil.rmtree(services.home / "metrics" / "evaluation")
    with pytest.raises(FinalError, match=r"materialize evaluation\[0001\] first"):
        judge(instance, services)


def test_a_checkpoint_made_again_needs_a_new_promotion_unless_it_is_the_same(instance, services):
    make(instance, services)
    run(model_checkpoint_asset(), instance, services, "0001")
    assert enter(instance, services, "0002").label == "model_checkpoint[0001]"
    judging = {"evaluation", "promotion"}
    assert not judging & set(missing_assets(instance, services, "0001"))
    run(model_checkpoint_asset("M_1 again"), instance, services, "0001")
    assert judging <= set(missing_assets(instance, services, "0001")), "`synpo run` makes them again"
    with pytest.raises(CheckpointError, match=r"by now: materialize evaluation\[0001\] and promotion\[0001\] again"):
        enter(instance, services, "0002")


def test_without_a_promotion_the_next_iteration_refuses(instance, services):
    make(instance, services)
    instance.wipe_assets([dg.AssetKey("promotion")])
    with pytest.raises(CheckpointError, match=r"promotion\[0001\] was never materialized: run that iteration first"):
        enter(instance, services, "0002")
    instance.report_runless_asset_event(dg.AssetMaterialization("promotion", partition="0001"))
    shutil.rmtree(services.home / "metrics" / "promotion")
    with pytest.raises(CheckpointError, match=r"promotion\[0001\] holds no verdict on model_checkpoint\[0001\]"):
        enter(instance, services, "0002")


def test_an_evaluation_of_a_checkpoint_that_does_not_exist_is_refused(nano_run, instance, tmp_path):
    for folder in ("checkpoints", "tables"):
        shutil.copytree(nano_run.home / folder, tmp_path / folder)
    (tmp_path / "checkpoints" / "model_checkpoint" / "0002.json").unlink()
    services = services_in(tmp_path, load_settings(nano_run.home / "settings.yaml"))
    with pytest.raises(
        DamageError, match=r"model_checkpoint\[0002\] has no checkpoint in .*: materialize model_checkpoint"
    ):
        run(stages_of(services.settings), instance, services, "0002", selection=["evaluation"])


def candidate(metric, value, **more):
    return Metric(metric, value, of="candidate", **more)


MEASURED = {
    "evaluation": [
        win_rates(0.6, INDEPENDENT), win_rates(0.4, INDEPENDENT, over="previous"), win_rates(0.9, TOOK_PART),
        candidate("length_controlled_win_rate", 0.55, low=0.4, over="initial", by=INDEPENDENT),
        candidate("mean_characters", 30),
        Metric("mean_characters", 40, of="initial"), candidate("held_out_reward", 1.5),
        Metric("held_out_reward", 1.0, of="initial"), candidate("mean_repetition", 0.3), candidate("cut_share", 0.7),
        Metric("cut_share", 0.2, of="initial"),
    ],
    "instruction_following": [
        candidate("verifiable_gain", -0.25, over="initial"), candidate("rule_rate_gain", -0.5, over="initial", by="avoids"),
    ],
    "gold_comparison": [
        candidate("gold_log_likelihood_gain", 0.5, over="initial"), candidate("gold_similarity_gain", 0.25, over="initial"),
    ],
    "preference_pairs": [Metric("mean_margin", 2.5), Metric("chosen_to_rejected_length", 1.25), Metric("rows", 8)],
    "prompt_diversity": [
        Metric("mean_similarity", 0.25, of="synthetic"), Metric("mean_similarity", 0.125, of="seed"), Metric("rows", 3),
    ],
}  # fmt: skip


def test_every_metric_that_may_be_limited_is_read_from_where_it_is_recorded(services):
    """And those of held-out prompts from what was measured on dev."""
    split = {"evaluation", "instruction_following", "gold_comparison"}
    for asset, metrics in MEASURED.items():
        on_test = [dataclasses.replace(each, value=77, split="test") for each in metrics]
        on_dev = [dataclasses.replace(each, split="dev") for each in metrics]
        measured(services, asset, *([*on_test, *on_dev] if asset in split else metrics))
    read = gate_metrics(recorded(services.metrics, "0001"))
    assert read == {
        "win_rate_over_initial": 0.6, "win_rate_over_previous": 0.4, "length_controlled_win_rate_over_initial": 0.55,
        "length_ratio": 0.75, "rule_rate_gain.avoids": -0.5, "win_rate_over_initial_by_scorer": 0.9,
        "held_out_reward_gain": 0.5, "verifiable_rate_gain": -0.25,
        "gold_log_likelihood_gain": 0.5, "gold_similarity_gain": 0.25,
        "mean_repetition": 0.3, "cut_share": 0.7, "prompt_similarity": 0.25, "prompt_similarity_to_seed": 2.0,
        "mean_margin": 2.5, "chosen_to_rejected_length": 1.25, "pairs_kept": 8,
    }  # fmt: skip
    certain, logged = (
        lowest_rates(judged_answers(["win", "tie"]), 0.05, 0),
        training_metrics([{"rewards/accuracies": 0.5}]),
    )
    assert logged == {"reward_accuracy": 0.5}
    assert {*read, *certain, *logged} == {*get_args(GateMetric), "rule_rate_gain.avoids"}
    assert set(gate_metrics(recorded(services.metrics, "0002")).values()) == {None}


# What the default gate promises.

GATE = Gate()


def passes(outcomes, previous=None, lengths=None):
    certain = lowest_rates(judged_answers(list(outcomes), previous, lengths), GATE.error_rate, 0)
    return all(row["passed"] for row in gate_rows(certain, GATE.minimum, GATE.maximum))


def test_a_win_rate_at_equal_length_that_no_pair_of_equal_length_was_seen_for_is_not_measured():
    """M_0's own answers cut to half would pass otherwise."""
    low = "length_controlled_win_rate_over_initial_low"
    many = ["win"] * 30 + ["loss"] * 10
    assert lowest_rates(judged_answers(many, None, [(1, 9)] * 31 + [(9, 9)] * 9), 0.05, 0)[low] is None
    assert lowest_rates(judged_answers(many, None, [(1, 9)] * 30 + [(9, 9)] * 10), 0.05, 0)[low] is not None
    # Of few prompts, half.
    for seen in (False, True):
        lengths = [(1, 9)] * (5 - seen) + [(9, 9)] * (3 + seen)
        assert (lowest_rates(judged_answers(["win"] * 8, None, lengths), 0.05, 0)[low] is not None) == seen


def test_prompts_without_a_verdict_do_not_make_the_gate_sure():
    outcomes = ["win"] * 8 + ["loss"] * 2
    low = lowest_rates(judged_answers(outcomes), 0.05, 0)
    unread = lowest_rates(judged_answers([*outcomes, *["no verdict"] * 90]), 0.05, 0)
    assert unread == pytest.approx(low)
    assert low["win_rate_over_previous_low"] < 0.5


def share_that_passes(rate, ties, times, prompts=100):
    """Of models that win so often: against M_0 and M_{t-1} alike, as at t = 1, at lengths that say nothing."""
    draw, passed = np.random.default_rng(1), 0
    for _ in range(times):
        outcomes = draw.choice(["win", "tie", "loss"], p=[rate - ties / 2, ties, 1 - rate - ties / 2], size=prompts)
        if win_rate_interval(pl.Series(outcomes), None, 1 - 2 * GATE.error_rate)[0] >= 0.5:
            passed += passes(outcomes, lengths=draw.integers(80, 120, (prompts, 2)).tolist())
    return passed / times


@pytest.mark.parametrize("ties", [0, 0.3])
def test_a_model_that_is_no_better_passes_in_one_case_of_twenty_at_most(ties):
    assert 0 < share_that_passes(0.5, ties, 600) <= 0.05


def test_a_model_that_is_clearly_better_passes_in_four_cases_of_five_at_least():
    assert share_that_passes(0.65, 0, 60) >= 0.8


def test_a_model_that_is_better_than_m0_and_not_than_the_one_before_does_not_pass():
    assert passes(["win"] * 80 + ["loss"] * 20)
    assert not passes(["win"] * 80 + ["loss"] * 20, previous=["win"] * 50 + ["loss"] * 50)


@pytest.mark.parametrize(("wins", "controlled", "characters", "noise"), [(68, 0.57, 93, 120), (67, 0.63, 76, 200)])
def test_the_two_ruined_runs_of_an_earlier_search_do_not_pass(wins, controlled, characters, noise):
    """They won 81 and 80 % of 84 prompts with answers like "meat rest meat rest", by being shorter than M_0's.

    The rows are lost: these have their win rates, their mean lengths, and about their length-controlled rates.
    """
    draw, prompts = np.random.default_rng(5), 84
    lengths = np.stack([draw.gamma(1.5, characters / 1.5, prompts), draw.normal(243, 60, prompts)], axis=1).astype(int)
    lengths = lengths.clip(1)
    difference = np.diff(lengths, axis=1)[:, 0]
    # The judge prefers the shorter answer, whatever else it sees.
    order = np.argsort(-difference + draw.normal(0, noise, prompts))
    outcomes = np.full(prompts, "loss", dtype=object)
    outcomes[order[::-1][-wins:]] = "win"
    frame = judged_answers(outcomes.tolist(), lengths=lengths.tolist())
    rate = length_controlled_win_rate(frame["judge_over_initial"], *(pl.Series(side) for side in lengths.T))
    assert rate == pytest.approx(controlled, abs=0.08)
    assert win_rate_interval(frame["judge_over_initial"])[0] > 0.65, "without control for length it would pass"
    assert not passes(outcomes, lengths=lengths.tolist())


def test_a_refused_checkpoint_is_judged_again_once_the_limits_were_changed(instance, services):
    """Else the same command again would refuse for ever, whatever the limits are by now."""
    for name in asset_names(services.graph, partitioned=True):
        instance.report_runless_asset_event(dg.AssetMaterialization(name, partition="0001"))

    def judged(promoted, version):
        tags = {"dagster/code_version": version}
        instance.report_runless_asset_event(dg.AssetMaterialization("promotion", partition="0001", tags=tags))
        measured(services, "promotion", candidate("promoted", float(promoted)))
        return "promotion" in missing_assets(instance, services, "0001"), outdated_assets(instance, services)

    assert judged(False, services.graph.get(dg.AssetKey("promotion")).code_version) == (False, [])
    assert judged(False, "other limits") == (True, [])
    assert judged(True, "other limits") == (False, ["promotion[0001]"])


def test_the_summary_of_a_run_says_what_was_promoted(nano_run):
    for iteration in (1, 2):
        sentence = (
            f"model_checkpoint[000{iteration}] was promoted to policy[000{iteration + 1}]: the gate has no limits."
        )
        assert sentence in " ".join(nano_run.result.stdout.split())


@pytest.mark.slow
def test_a_run_stops_after_an_iteration_that_was_not_promoted(nano_run, tmp_path):
    """The real M_2: refused for one metric of two, by `synpo run` too; with other limits it enters iteration 3."""
    home = tmp_path / "home"
    shutil.copytree(nano_run.home, home)
    file = home / "settings.yaml"
    limits = {"minimum": {"win_rate_over_initial_low": 0.0, "pairs_kept": 1000}}
    write_settings(file, yaml.safe_load(file.read_text()) | {"gate": limits})
    services = services_in(home, load_settings(file))
    with dg.DagsterInstance.from_config(str(home)) as persistent:
        run([promotion], persistent, services, "0002")
        refusal = promotion_refusal(services, "0002")
        assert refusal.startswith("model_checkpoint[0002] was not promoted to policy[0003]: pairs_kept is ")
        stopped = synpo("run", "--home", home, "--iterations", 3)
        assert stopped.returncode == 1
        assert refusal in " ".join(stopped.stderr.split()), stopped.stderr[-3000:]
        assert not (home / "tables" / "keyword_sets" / "0003.parquet").exists()
        run([promotion], persistent, with_gate(services, minimum={"pairs_kept": 1}), "0002")
        assert promotion_refusal(services, "0002") is None
        assert data_version_of(persistent, "policy", "0003") == shown(persistent, "policy", "0003")["sha"][:16]


def test_a_judge_at_chance_promotes_nothing(instance, services):
    """Whatever it says of M_t; limits that do not ask it are judged as ever."""
    make(instance, services, metrics=LOOPS)
    accuracy = {"of": BOTH_ENDED, "n": 32, "low": 0.42, "high": 0.76}
    record(services.metrics, "judge_model", None, [Metric("held_out_accuracy", 0.6, **accuracy)])
    table, about = judge(instance, services, minimum=GATE.minimum, maximum={"mean_repetition": 0.5})
    assert table.select("metric", "value", "passed").rows() == [
        ("length_controlled_win_rate_over_initial_low", None, False), ("win_rate_over_previous_low", None, False),
        ("mean_repetition", 0.4, True),
    ]  # fmt: skip
    assert (
        "win_rate_over_previous_low was not measured (The judge is right about 60.0% (42.0 to 76.0) of 32"
        in about["verdict"]
    )
    record(services.metrics, "judge_model", None, [Metric("held_out_accuracy", 0.9, **accuracy | {"low": 0.8})])
    table, about = judge(instance, services, minimum=GATE.minimum, maximum={})
    assert table["passed"].all()
    assert about["power"].startswith(
        "With 20 dev prompts, a model that truly wins 65 % of them reaches the gate's low ends in"
    )


def test_the_power_of_a_gate_is_known_for_any_number_of_prompts():
    limits = {"win_rate_over_previous_low": 0.5}
    assert "in 0 % of the cases" in gate_power(0, limits, 0.05)
    assert gate_power(5000, limits, 0.05).endswith("in 100 % of the cases.")
