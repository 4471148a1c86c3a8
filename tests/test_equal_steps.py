"""The control of equal steps: what it is trained on and for how long, what it is compared with, and when it is refused."""

import contextlib
import dataclasses
from types import SimpleNamespace

import dagster as dg
import polars as pl
import pytest

from resources.common.errors import FinalError
from resources.judging.judge_choice import INDEPENDENT, TOOK_PART
from resources.models.likelihood import AnswerLikelihood, Likelihoods
from resources.settings.files import load_settings
from resources.settings.sections import SettingsError
from resources.storage.checkpoint_store import Checkpoint
from resources.training.trainer import Trainer
from synpo_assets.cli.estimate import expected_work, sizes_of
from synpo_assets.cli.preflight import disk_needed
from synpo_assets.evaluation.equal_steps import (
    equal_steps_checkpoint,
    equal_steps_evaluation,
    equal_steps_gold,
    equal_steps_instructions,
    first_pairs,
    refuse_control_of_another,
    refuse_other_start,
)
from synpo_assets.evaluation.instruction_following import instruction_following
from synpo_assets.evaluation.win_rates import JUDGING_READS, evaluation
from synpo_assets.graph.evaluation_schemas import EqualSteps, EqualStepsGold, EqualStepsInstructions
from synpo_assets.graph.metrics import recorded
from synpo_assets.graph.missing import missing_assets
from synpo_assets.graph.presentation import table_version
from synpo_assets.graph.schemas import PreferenceHistory
from synpo_assets.graph.services import USED_SETTINGS
from synpo_assets.graph.tables import check
from synpo_assets.graph.used_settings import refuse_other_settings
from synpo_assets.stages.optimization import model_checkpoint
from synpo_assets.stages.seed import initial_policy
from tests.nano import active_settings, nano_settings, write_settings
from tests.stand_ins import ITERATIONS, graph_of, run, services_in
from tests.stand_ins import instance as instance
from tests.test_ablations import entering, preference_history, preference_pairs
from tests.test_evaluation import materialize, stand_in
from tests.test_loop import pairs
from tests.test_stores import create, write_weights
from tests.test_training import EXAMPLES, PAIRED, SFT, SIMPO
from tests.test_training import pairs as training_pairs
from tests.test_training import trainer as trainer

CONTROLS = {"equal_steps_checkpoint", "equal_steps_evaluation", "equal_steps_gold", "equal_steps_instructions"}


def with_control(settings, **changes):
    changes = {"equal_steps_control": True, **changes}
    options = settings.preference_optimization.model_copy(update=changes)
    return settings.model_copy(update={"preference_optimization": options})


# Steps in place of epochs.


@pytest.mark.slow
def test_a_training_takes_as_many_steps_as_it_is_told(trainer, nano_checkpoint, tmp_path):
    """Eight pairs in batches of four: five steps are two passes and a half."""
    scheduled = PAIRED.model_copy(update={"scheduler": "linear", "warmup_ratio": 0.2})
    whole = trainer.train("preference", nano_checkpoint, training_pairs(), scheduled, tmp_path / "one", SIMPO)
    told = trainer.train("preference", nano_checkpoint, training_pairs(), scheduled, tmp_path / "five", SIMPO, 5)
    assert (whole.steps, told.steps) == (2, 5)
    assert told.tokens == round(2.5 * whole.tokens)
    rates = [entry["learning_rate"] / scheduled.learning_rate for entry in told.history if "learning_rate" in entry]
    # One of five steps warms up, and the other four lead down.
    assert rates == pytest.approx([0, 1, 0.75, 0.5, 0.25])


@pytest.mark.slow
def test_the_same_number_of_steps_is_the_same_training(trainer, nano_checkpoint, tmp_path):
    """Else M_1 would not be its own control."""
    runs = [
        trainer.train("supervised", nano_checkpoint, EXAMPLES, SFT, tmp_path / str(steps), None, steps)
        for steps in (None, 2)
    ]
    losses = [[entry["loss"] for entry in summary.history] for summary in runs]
    assert losses[0] == losses[1]
    assert runs[0].tokens == runs[1].tokens


# The checkpoint.


@pytest.fixture
def iteration(instance, tmp_path, nano_model):
    """Makes M_t and its control from stand-in pairs: two of iteration 1, three of iteration 2."""

    def iteration(key, **changes):
        trained = []

        class Recorder(Trainer):
            def train(self, kind, start, rows, training, directory, loss, steps=None):
                summary = super().train(kind, start, rows, training, directory, loss, steps)
                trained.append((start.asset, [row["iteration"] for row in rows], summary.steps))
                return summary

        one_each = active_settings().preference_optimization.training.model_copy(
            update={"batch_size": 1, "micro_batch_size": 1}
        )
        services = services_in(tmp_path / "home", with_control(active_settings(), training=one_each, **changes))
        services = dataclasses.replace(services, trainer=Recorder(**dict(services.trainer)))
        run([initial_policy], instance, services)
        stages = [initial_policy, entering, preference_history, preference_pairs, model_checkpoint]
        selection = ["policy", "preference_history", "preference_pairs", "model_checkpoint", "equal_steps_checkpoint"]
        run([*stages, equal_steps_checkpoint], instance, services, key, selection=selection)
        return services, trained

    return iteration


@pytest.mark.slow
@pytest.mark.parametrize(("accumulate", "learned"), [(True, [1, 1, 2, 2, 2]), (False, [2, 2, 2])])
def test_the_control_sees_the_first_pairs_for_as_many_steps(iteration, accumulate, learned):
    services, trained = iteration("0002", accumulate=accumulate)
    assert trained == [
        ("initial_policy", learned, len(learned)),
        ("initial_policy", [1, 1], len(learned)),
    ]
    made = services.checkpoints.current("equal_steps_checkpoint", "0002")
    assert made.manifest["trained_on"] == {"preference_pairs[0001]": table_version(pairs(1, 2))}
    compared = services.checkpoints.current("model_checkpoint", "0002")
    assert made.manifest["parents"]["control of"]["sha"] == compared.sha
    # All stand-in pairs say the same, so that the same steps on other pairs make the same weights.
    assert made.sha == compared.sha
    measured = recorded(services.metrics, "0002")
    steps = [measured.value("training_steps", asset=name) for name in ("equal_steps_checkpoint", "model_checkpoint")]
    assert steps == [len(learned)] * 2
    other = Checkpoint("model_checkpoint", "0002", "f" * 64, "", "")
    with pytest.raises(
        FinalError, match=r"model_checkpoint\[0002\] is f{16} by now: materialize equal_steps_checkpoint"
    ):
        refuse_control_of_another(made, other)


def test_in_iteration_1_the_control_is_m_1_itself_and_made_again_with_it(iteration, instance):
    services, trained = iteration("0001")
    assert len(trained) == 1
    control, made = (
        services.checkpoints.current(name, "0001") for name in ("equal_steps_checkpoint", "model_checkpoint")
    )
    assert control == made
    refuse_control_of_another(control, made)
    assert "equal_steps_checkpoint" not in missing_assets(instance, services, "0001")
    again = create(services.checkpoints, write_weights("M_1 again"), "0001")
    services.checkpoints.point_to("model_checkpoint", "0001", again)
    assert "equal_steps_checkpoint" in missing_assets(instance, services, "0001")


@pytest.mark.slow
def test_the_control_is_made_again_where_only_its_own_pairs_were(iteration, instance):
    """Without accumulation M_2 does not learn from the pairs of iteration 1."""
    services, _ = iteration("0002", accumulate=False)
    for version in (services.checkpoints.manifest("equal_steps_checkpoint", "0002")["trained_on"], "made again"):
        tags = {"dagster/data_version": version if isinstance(version, str) else version["preference_pairs[0001]"]}
        instance.report_runless_asset_event(dg.AssetMaterialization("preference_pairs", partition="0001", tags=tags))
        missing = missing_assets(instance, services, "0002")
        assert ("equal_steps_checkpoint" in missing) == (version == "made again")
        assert "model_checkpoint" not in missing


@pytest.mark.parametrize(("start", "version", "said"), [
    ("0" * 64, "as then", None),
    ("0" * 64, "of now", r"was made from another version of preference_pairs\[0001\] than its control"),
    ("1" * 64, "as then", "was made from another model, 0000000000000000, than its control"),
])  # fmt: skip
def test_a_control_that_would_start_or_learn_otherwise_is_refused(start, version, said):
    manifest = {"parents": {"start": {"sha": "0" * 64}}, "trained_on": {"preference_pairs[0001]": "as then"}}
    made = SimpleNamespace(label="model_checkpoint[0002]", manifest=manifest)
    begins = Checkpoint("initial_policy", None, start, "", "")
    with pytest.raises(FinalError, match=said) if said else contextlib.nullcontext():
        refuse_other_start(made, begins, {"preference_pairs[0001]": version})
    # Where only the pairs of its own iteration are learned from, those of iteration 1 are the control's alone.
    manifest["trained_on"] = {"preference_pairs[0002]": "as then"}
    if start == "0" * 64:
        refuse_other_start(made, begins, {"preference_pairs[0001]": version})


def test_what_was_answered_with_other_settings_is_not_compared_with(tmp_path):
    services = services_in(tmp_path, active_settings())
    value = str(active_settings().evaluation.sampling.max_new_tokens)
    for written, said in (
        (value, None),
        ("1", rf"evaluation\[0002\].*max_new_tokens 1 then, {value} now.*materialize"),
    ):
        rows = [("evaluation", "evaluation.sampling.max_new_tokens", written)]
        services.used_settings.write("evaluation", "0002", pl.DataFrame(rows, schema=USED_SETTINGS, orient="row"))
        with pytest.raises(FinalError, match=said) if said else contextlib.nullcontext():
            refuse_other_settings(services, "evaluation", "0002", JUDGING_READS)
    refuse_other_settings(services, "evaluation", "0001", JUDGING_READS)


def test_a_control_of_a_policy_that_goes_on_from_the_one_before_is_refused(tmp_path, nano_model):
    settings = nano_settings(nano_model)
    settings["preference_optimization"] |= {"equal_steps_control": True, "policy_init": "previous"}
    with pytest.raises(SettingsError, match="Set policy_init to `initial`, or the control to false"):
        load_settings(write_settings(tmp_path / "settings.yaml", settings))


def test_without_the_pairs_of_iteration_1_there_is_no_control():
    history = PreferenceHistory.validate(pairs(2, 3))
    with pytest.raises(FinalError, match=r"needs the pairs of iteration 1.*run iteration 1 first"):
        first_pairs(history)


# The evaluation.


def test_the_controls_answers_are_compared_with_those_of_m_0_and_m_t(instance, tmp_path, monkeypatch):
    control = stand_in("equal_steps_checkpoint", "control", ITERATIONS)
    monkeypatch.setattr("synpo_assets.evaluation.equal_steps.refuse_control_of_another", lambda *_: None)
    scorers = [stand_in("reward_model", "F"), stand_in("judge_model", "J"), control]
    assets = [*scorers, evaluation, equal_steps_evaluation]
    _, services, result = materialize(assets, instance, tmp_path, monkeypatch)
    frame = result.output_for_node("equal_steps_evaluation")
    assert check(EqualSteps, frame) is None
    assert frame["prompt_id"].to_list() == result.output_for_node("evaluation")["prompt_id"].to_list()
    assert frame.select(f"{side}_response" for side in ("control", "candidate", "initial")).unique().rows() == [
        ("by control", "by M_2", "By M_0.")
    ]
    measured = recorded(services.metrics, "0002")
    of_control = [rate for rate in measured.every("win_rate") if rate.of == "equal_steps"]
    assert [(rate.over, rate.by, rate.value, rate.n) for rate in of_control] == [
        (over, by, 1.0, 3) for by in (INDEPENDENT, TOOK_PART) for over in ("initial", "candidate")
    ]
    assert all(0 < rate.low < rate.high == 1 for rate in of_control)
    assert {rate.checkpoint_sha for rate in of_control} == set(frame["control_checkpoint_sha"])
    assert measured.value("cut_share", "equal_steps") == 0.0
    assert measured.value("win_rate", "candidate", over="initial", by=INDEPENDENT) == 1.0


RULES = {"Name it.": ("contains", "M_2"), "Say it.": ("contains", "control"), "Put it.": ("words_at_most", "2")}


@dg.asset(io_manager_key="tables")
def verifiable_instructions() -> pl.DataFrame:
    rows = [
        {
            "prompt_id": prompt,
            "split": "test",
            "prompt": prompt,
            "constraints": [{"rule": rule, "value": value}],
            "template": prompt,
        }
        for prompt, (rule, value) in RULES.items()
    ]
    return pl.DataFrame(rows)


def test_the_instructions_that_the_control_follows_are_counted_beside_those_of_m_t(instance, tmp_path, monkeypatch):
    control = stand_in("equal_steps_checkpoint", "control", ITERATIONS)
    monkeypatch.setattr("synpo_assets.evaluation.equal_steps.refuse_control_of_another", lambda *_: None)
    assets = [control, verifiable_instructions, instruction_following, equal_steps_instructions]
    _, services, result = materialize(assets, instance, tmp_path, monkeypatch)
    frame = result.output_for_node("equal_steps_instructions")
    assert check(EqualStepsInstructions, frame) is None
    asked = frame.filter(sample=1).iter_rows(named=True)
    held = {row["prompt"]: (*row["candidate_met"], *row["control_met"]) for row in asked}
    # The models write their names.
    assert held == {"Name it.": (True, False), "Say it.": (False, True), "Put it.": (True, True)}
    measured = recorded(services.metrics, "0002")
    assert measured.value("verifiable_rate", "equal_steps") == pytest.approx(2 / 3)
    gain = measured.find("verifiable_gain", "candidate", over="equal_steps")
    assert (gain.value, gain.n, gain.checkpoint_sha) == (0, 3, frame["candidate_checkpoint_sha"][0])
    rate = measured.find("verifiable_rate", "equal_steps")
    assert rate.checkpoint_sha == frame["control_checkpoint_sha"][0]
    # Of three prompts nothing can be said of how much they differ.
    assert (gain.low, gain.high) == (None, None)


@dg.asset(io_manager_key="tables", partitions_def=ITERATIONS)
def gold_comparison(model_checkpoint: Checkpoint) -> pl.DataFrame:
    rows = [
        {"prompt_id": f"{split} {place}", "split": split, "prompt": "Which?", "answer": "gold " * place, "iteration": 2,
         "candidate_log_likelihood": -1.0 * place, "candidate_other_log_likelihood": -4.0,
         "candidate_checkpoint_sha": model_checkpoint.sha}
        for split in ("dev", "test") for place in (1, 2, 3)
    ]  # fmt: skip
    return pl.DataFrame(rows)


class GoldReader(AnswerLikelihood):
    """To the control, each word of gold costs half as much again as to M_t; nobody else is asked."""

    def measure(self, checkpoint, rows):
        assert checkpoint.asset == "equal_steps_checkpoint"
        return Likelihoods([-1.5 * len(answer.split()) for _, answer in rows], [-1.0] * len(rows), 12, 0.5)


def test_how_likely_the_control_finds_gold_is_measured_beside_m_t(instance, tmp_path, monkeypatch):
    control = stand_in("equal_steps_checkpoint", "control", ITERATIONS)
    monkeypatch.setattr("synpo_assets.evaluation.equal_steps.refuse_control_of_another", lambda *_: None)
    reader = GoldReader(engine=active_settings().engine)
    services = dataclasses.replace(services_in(tmp_path, active_settings()), likelihood=reader)
    made = stand_in("model_checkpoint", "M_2", ITERATIONS)
    result = run([made, control, gold_comparison, equal_steps_gold], instance, services, "0002")
    frame = result.output_for_node("equal_steps_gold")
    assert check(EqualStepsGold, frame) is None
    assert frame.filter(split="test")["control_log_likelihood"].to_list() == [-1.5, -3, -4.5]
    measured = recorded(services.metrics, "0002")
    gain = measured.find("gold_log_likelihood_gain", "candidate", over="equal_steps")
    assert (gain.value, gain.n, gain.checkpoint_sha) == (1.0, 3, frame["candidate_checkpoint_sha"][0])
    assert (gain.low, gain.high) == (None, None)
    # Gold of the row that stands two behind it, in a circle of three.
    assert frame.filter(split="test")["control_other_log_likelihood"].to_list() == [-4.5, -1.5, -3]
    nulls = [measured.find(f"{name}", "candidate", over="equal_steps").value for name in
             ("other_gold_log_likelihood_gain", "gold_log_likelihood_gain_beyond_other")]  # fmt: skip
    assert nulls == [-1.0, 2.0]
    found = measured.find("gold_log_likelihood", "equal_steps")
    assert (found.value, found.checkpoint_sha) == (-3.0, frame["control_checkpoint_sha"][0])
    assert (measured.value("scored_tokens"), measured.value("scoring_seconds")) == (12, 0.5)


def test_where_the_control_is_m_t_itself_gold_is_not_read_again(instance, tmp_path, monkeypatch):
    monkeypatch.setattr("synpo_assets.evaluation.equal_steps.refuse_control_of_another", lambda *_: None)
    models = [stand_in(name, "M_1", ITERATIONS) for name in ("model_checkpoint", "equal_steps_checkpoint")]
    services = dataclasses.replace(services_in(tmp_path, active_settings()), likelihood=None)
    run([*models, gold_comparison, equal_steps_gold], instance, services, "0001")
    measured = recorded(services.metrics, "0001")
    assert measured.value("gold_log_likelihood", "equal_steps") == -2.0
    assert measured.find("gold_log_likelihood_gain", "candidate", over="equal_steps").value == 0
    assert measured.value("scored_tokens") == 0


@pytest.mark.parametrize(
    ("refusal", "reason"),
    [
        ("refuse_answers_of_another", "is the control of"),
        ("refuse_control_of_another", "in `gold_comparison` are those of"),
    ],
)
def test_gold_of_another_m_t_or_control_is_refused(instance, tmp_path, monkeypatch, refusal, reason):
    """Each by itself."""

    @dg.asset(io_manager_key="tables", partitions_def=ITERATIONS)
    def gold_comparison() -> pl.DataFrame:
        return pl.DataFrame({"candidate_checkpoint_sha": ["f" * 64]})

    monkeypatch.setattr(f"synpo_assets.evaluation.equal_steps.{refusal}", lambda *_: None)
    models = [
        stand_in("model_checkpoint", "M_2", ITERATIONS),
        stand_in("equal_steps_checkpoint", "control", ITERATIONS),
    ]
    with pytest.raises(FinalError, match=reason):
        run([*models, gold_comparison, equal_steps_gold], instance, services_in(tmp_path, active_settings()), "0002")


# The setting.


def test_only_the_setting_brings_the_control_into_the_graph():
    off, on = active_settings(), with_control(active_settings())
    assets = [{key.to_user_string() for key in graph_of(settings).materializable_asset_keys} for settings in (off, on)]
    assert assets[1] - assets[0] == CONTROLS
    checks = graph_of(on).get(dg.AssetKey("equal_steps_checkpoint")).check_keys
    assert {check.name for check in checks} == {"finite_weights", "update_survives"}


def test_a_control_without_a_second_iteration_is_refused(tmp_path, nano_model):
    settings = nano_settings(nano_model) | {"max_iterations": 1}
    settings["preference_optimization"] |= {"equal_steps_control": True}
    with pytest.raises(SettingsError, match=r"in iteration 1 the control of equal steps is M_1 itself"):
        load_settings(write_settings(tmp_path / "settings.yaml", settings))


def test_the_estimate_counts_the_control_from_iteration_2(nano_model):
    seed = pl.DataFrame({"split": ["train", "held_out"], "prompt": ["a b"] * 2, "answer": ["c d"] * 2})
    settings = with_control(active_settings())
    planned = expected_work(sizes_of(settings, seed, 0))
    (control,) = [work for stage, work in planned if stage is equal_steps_checkpoint]
    (made,) = [work for stage, work in planned if stage is model_checkpoint]
    assert control.in_iteration(1) == 0
    assert control.in_iteration(3) == made.in_iteration(3) > 0
    assert disk_needed(settings) > disk_needed(active_settings())
