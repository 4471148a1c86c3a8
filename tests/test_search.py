"""The search: what is tried in which order, what is kept of one that was killed, what it may read, and who becomes M_t."""

import dataclasses
import json
import threading
from contextlib import suppress
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
import yaml

from definitions import build
from resources.common.errors import FinalError
from resources.generation.language_model import Usage
from resources.scoring.scorer import Comparison, ScoringUsage
from resources.settings.files import load_settings
from resources.settings.machine import Engine
from resources.settings.search import combinations
from resources.settings.sections import SettingsError
from resources.settings.training import TrainingProcesses
from resources.storage.files import storage_root
from resources.training.job import TrainingError, TrainingSummary
from resources.training.trainer import Trainer
from synpo_assets.cli.clean import _current_manifests, _without_past_candidates
from synpo_assets.cli.estimate import expected_work, sizes_of
from synpo_assets.cli.preflight import disk_needed, refuse_small_budget
from synpo_assets.evaluation.search import model_checkpoint, refuse_doubtful_metric, search_candidates
from synpo_assets.graph.metrics import Metric, recorded
from synpo_assets.graph.schemas import SearchCandidates
from synpo_assets.graph.tables import check
from synpo_assets.method.judging import BOTH_ENDED
from synpo_assets.method.rules import CONSTRAINTS
from synpo_assets.reports.search import HEAD, candidate_rows, chosen_text, chosen_values
from tests.nano import active_settings, nano_settings, write_settings
from tests.stand_ins import ITERATIONS, measured, run, services_in, shown, without_rules
from tests.stand_ins import instance as instance
from tests.test_ablations import preference_history, preference_pairs
from tests.test_evaluation import stand_in
from tests.test_training import PAIRED, SIMPO
from tests.test_training import pairs as training_pairs

GRID = {"loss.beta": [2.0, 4.0], "learning_rate": [1e-3, 3e-3], "metric": "win_rate"}


def with_search(**search):
    """The nano settings with a search."""
    settings = active_settings().model_dump()
    settings["preference_optimization"]["search"] = search
    return type(active_settings()).model_validate(settings)


# The settings.


def test_the_learning_rate_comes_first_then_the_loss():
    search = with_search(
        **{"epochs": [1, 2], "loss.beta": [2, 4, 6], "learning_rate": [1e-3]}
    ).preference_optimization.search
    assert list(search.space) == ["learning_rate", "loss.beta", "epochs"]
    assert [tuple(each.values()) for each in combinations({"learning_rate": [1, 2], "loss.beta": [3, 4]})] == [
        (1, 3), (2, 3), (1, 4), (2, 4),
    ]  # fmt: skip
    assert search.candidates == 6
    assert search.model_copy(update={"max_candidates": 4}).candidates == 4
    assert with_search(**GRID, how="in_turn").preference_optimization.search.candidates == 4


def test_sections_and_dotted_names_mean_the_same():
    nested = with_search(loss={"beta": [2.0]}, training={"learning_rate": [1e-3]})
    assert nested == with_search(**{"loss.beta": [2.0], "training.learning_rate": [1e-3]})
    assert nested == type(nested).model_validate(nested.model_dump())


@pytest.mark.parametrize(
    ("search", "sentence"),
    [
        ({}, r"search names no setting.*There are learning_rate, .*loss\.beta, loss\.gamma\."),
        ({"max_candidates": 2}, "search names no setting"),
        ({"loss.bta": [2]}, r"`loss\.bta` is not a setting that can be searched; did you mean `loss\.beta`\? There are"),
        ({"loss.kind": ["dpo"]}, r"`loss\.kind` is not a setting that can be searched"),
        ({"metrik": "win_rate"}, "did you mean `metric`"),
        ({"loss.beta": []}, r"the list of `loss\.beta` is empty: name its values"),
        ({"loss.beta": 3}, r"`loss\.beta` is 3: give a list"),
        ({"loss.beta": [2, -1]}, r"`preference_optimization\.search\.loss\.beta` is -1: input should be greater than 0\."),
        ({"scheduler": ["cosin"]}, r"search\.scheduler` is 'cosin': input should be 'cosine', 'linear' or 'constant'\."),
        ({"batch_size": [6]}, r"micro_batch_size \(4\) does not divide batch_size \(6\): choose one that does\."),
        ({"loss.beta": [2], "max_candidates": 0}, "max_candidates` is 0: input should be greater than or equal to 1"),
        ({"loss.beta": [2], "max_minutes": 0}, "max_minutes` is 0: input should be greater than 0"),
        ({"loss.beta": list(range(1, 40)), "epochs": list(range(1, 40))}, "search has 1,521 candidates, and 1,000 are the most"),
    ],
)  # fmt: skip
def test_a_search_that_cannot_be_is_refused(tmp_path, nano_model, search, sentence):
    settings = nano_settings(nano_model)
    settings["preference_optimization"]["search"] = search
    with pytest.raises(SettingsError, match=sentence):
        load_settings(write_settings(tmp_path / "settings.yaml", settings))


def test_what_a_value_breaks_is_said_as_of_the_setting_itself(tmp_path, nano_model):
    said = []
    for changed in ({"loss": {"beta": -1}}, {"search": {"loss.beta": [-1]}}):
        settings = nano_settings(nano_model)
        settings["preference_optimization"] |= changed
        with pytest.raises(SettingsError) as refused:
            load_settings(write_settings(tmp_path / "settings.yaml", settings))
        said.append(str(refused.value).replace("search.", ""))
    assert said[0] == said[1]


def test_processes_that_share_a_training_leave_no_place_beside_it(tmp_path, nano_model):
    settings = nano_settings(nano_model) | {"training_processes": {"processes": 2}}
    settings["preference_optimization"]["search"] = {"loss.beta": [2], "parallel": 2}
    with pytest.raises(SettingsError, match=r"search\.parallel is 2, and training_processes spreads each training"):
        load_settings(write_settings(tmp_path / "settings.yaml", settings))


def test_instructions_that_nobody_stated_cannot_choose(tmp_path, nano_model):
    settings = nano_settings(nano_model)
    settings["seed_data"]["verifiable"] = None
    settings["preference_optimization"]["search"] = {"loss.beta": [2], "metric": "instructions"}
    with pytest.raises(
        SettingsError, match=r"search\.metric is `instructions` and seed_data\.verifiable is not stated"
    ):
        load_settings(write_settings(tmp_path / "settings.yaml", settings))


# The candidates, on models that stand in.

HELD_OUT = pl.DataFrame(
    [
        {"prompt_id": f"prompt-{split}{n}", "prompt": f"{split} {n}", "answer": "a", "split": split, "line": 1}
        for split in ("train", "dev", "test")
        for n in range(4)
    ],
    schema_overrides={"line": pl.Int64},
)


@dg.asset(io_manager_key="tables")
def seed_pairs() -> pl.DataFrame:
    return without_rules(HELD_OUT)


@dg.asset(io_manager_key="tables")
def verifiable_instructions() -> pl.DataFrame:
    asked = HELD_OUT.filter(pl.col("split") != "train").select("prompt_id", "prompt", "split")
    rules = pl.Series("constraints", [[{"rule": "contains", "value": "3"}]] * asked.height, CONSTRAINTS)
    return asked.with_columns(rules)


class Tuner(Trainer):
    """Trains in no time: the weights say what the training was told."""

    def train(self, kind, start, rows, training, directory, loss=None, steps=None):
        tried = f"beta {loss.beta:g} rate {training.learning_rate:g}"
        LOG.append((tried, self.own_gpu, threading.current_thread() is threading.main_thread()))
        if tried in FAILING:
            raise FAILING[tried]
        (directory / "merged").mkdir()
        (directory / "merged" / "model.safetensors").write_text(tried)
        history = [{"loss": loss.beta, "step": 1, "rewards/accuracies": 0.5}]
        (directory / "trainer_log.jsonl").write_text(json.dumps(history[0]))
        return TrainingSummary(len(rows), 0, 0, 9, 1, 60.0, history)


class Answers:
    """Answers with the number of dev prompts that the candidate wins."""

    def answer(self, checkpoint, prompts, sampling):
        asked = list(prompts)
        ASKED.update(messages[0]["content"] for _, messages in asked)
        told = Path(checkpoint.weights, "model.safetensors").read_text()
        tokens = {"input_tokens": pl.lit(3, pl.Int64), "output_tokens": pl.lit(4, pl.Int64)}
        frame = pl.DataFrame({"id": [row_id for row_id, _ in asked], "text": str(WINS.get(told, 0))})
        return frame.with_columns(finish_reason=pl.lit("stop"), **tokens), Usage(len(asked), 0, 3, 4, 4, 0, 1.0)

    def compare(self, model, rows, judging=False):
        scores = [[float(int(answer) > int(prompt[-1])) for prompt, *pair in rows for answer in pair[place : place + 1]]
                  for place in (0, 1)]  # fmt: skip
        first, _ = map(pl.Series, scores)
        return Comparison(first, first * 0 + 0.5, "reward_difference", ScoringUsage(1, 0, 1, 0, 0, 1.0))


LOG, ASKED, FAILING, WINS = [], set(), {}, {}
MODELS = [stand_in("initial_policy", "M_0"), stand_in("judge_model", "J"), stand_in("policy", "M_1", ITERATIONS),
          seed_pairs, verifiable_instructions, preference_history, preference_pairs]  # fmt: skip


@pytest.fixture
def searched(instance, tmp_path, monkeypatch):
    """Runs a search of an iteration, again and again in the same home."""
    for each in (LOG, ASKED, FAILING, WINS):
        each.clear()
    WINS.update({"beta 2 rate 0.001": 1, "beta 2 rate 0.003": 2, "beta 4 rate 0.001": 4, "beta 4 rate 0.003": 3})
    monkeypatch.setattr("synpo_assets.evaluation.candidates.judge_scorer", lambda judge, scorer: scorer)

    def searched(key="0001", made=True, **search):
        services = services_in(tmp_path / "home", with_search(**{**GRID, **search}))
        tuner = Tuner(**dict(services.trainer))
        services = dataclasses.replace(services, trainer=tuner, language_model=Answers(), scorer=Answers())
        stages = [search_candidates, model_checkpoint] if made else [search_candidates]
        run([*MODELS, *stages], instance, services, key)
        return services, services.tables.read("search_candidates", key)

    return searched


def tried():
    return [each for each, *_ in LOG]


def test_the_best_candidate_becomes_m_t(searched, instance):
    services, frame = searched()
    assert check(SearchCandidates, frame) is None
    assert tried() == ["beta 2 rate 0.001", "beta 2 rate 0.003", "beta 4 rate 0.001", "beta 4 rate 0.003"]
    assert frame["value"].to_list() == [0.25, 0.5, 1.0, 0.75]
    assert frame["chosen"].to_list() == [False, False, True, False]
    assert set(frame["n"]) == {4}
    assert (frame["low"] < frame["value"]).all()
    made = services.checkpoints.current("model_checkpoint", "0001")
    assert made.sha == frame["checkpoint_sha"][2]
    candidate = services.checkpoints.current("search_candidates", frame["candidate"][2])
    assert made.manifest["parents"]["candidate"]["sha"] == candidate.sha
    assert candidate.manifest["trained_on"] == made.manifest["trained_on"]
    assert made.manifest["settings"]["preference_optimization"]["loss"]["beta"] == 4
    assert services.checkpoints.training_log("model_checkpoint", "0001")[-1]["loss"] == 4
    # On one disk, once.
    assert Path(made.weights, "model.safetensors").samefile(Path(candidate.weights, "model.safetensors"))
    metrics = recorded(services.metrics, "0001")
    assert metrics.value("training_steps", asset="model_checkpoint") == 1
    assert metrics.value("trained_tokens", asset="search_candidates") == 36
    assert metrics.value("trained_tokens", asset="model_checkpoint") is None
    for asset in ("search_candidates", "model_checkpoint"):
        rows = [record.data for record in shown(instance, asset, "0001")["search"].records]
        assert [row["value"] for row in rows] == frame["value"].to_list()


@pytest.mark.slow
def test_of_equal_candidates_the_first_is_chosen(searched):
    WINS.update(dict.fromkeys(WINS, 3))
    _, frame = searched()
    assert frame["chosen"].to_list() == [True, False, False, False]


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["win_rate", "length_controlled", "instructions"])
def test_no_prompt_of_another_split_is_asked(searched, metric):
    _, frame = searched(metric=metric)
    assert {f"dev {number}" for number in range(4)} == ASKED
    if metric == "instructions":
        # Whoever wins three prompts says `3`, as the instructions want.
        assert frame["value"].to_list() == [0, 0, 0, 1]
        assert set(frame["metric"]) == {"verifiable_gain"}


@pytest.mark.slow
def test_in_turn_goes_on_from_the_best_so_far(searched):
    """The learning rate with the settings' own beta 2, then the other beta with the better rate."""
    _, frame = searched(how="in_turn")
    assert tried() == ["beta 2 rate 0.001", "beta 2 rate 0.003", "beta 4 rate 0.003"]
    assert frame["chosen"].to_list() == [False, False, True]


def test_what_a_killed_search_finished_is_not_trained_again(searched):
    FAILING["beta 2 rate 0.003"] = dg.Failure("killed", allow_retries=False)
    with suppress(dg.Failure):
        searched()
    assert tried() == ["beta 2 rate 0.001", "beta 2 rate 0.003"]
    for each in (LOG, FAILING):
        each.clear()
    services, frame = searched()
    assert tried() == ["beta 2 rate 0.003", "beta 4 rate 0.001", "beta 4 rate 0.003"]
    assert frame["chosen"].to_list() == [False, False, True, False]
    # A longer list trains what is new in it.
    searched(**{"loss.beta": [2.0, 4.0, 8.0]})
    assert tried()[3:] == ["beta 8 rate 0.001", "beta 8 rate 0.003"]
    assert services.checkpoints.current("search_candidates", frame["candidate"][0]).sha == frame["checkpoint_sha"][0]


@pytest.mark.slow
def test_a_budget_of_candidates_is_kept(searched):
    _, frame = searched(max_candidates=3)
    assert len(LOG) == 3
    assert frame["left_out"].to_list() == [None, None, None, "max_candidates is 3"]
    assert frame["chosen"].to_list() == [False, False, True, False]


@pytest.mark.slow
def test_a_budget_of_minutes_is_kept_with_what_an_earlier_run_took(searched):
    """Each stand-in training says that it took a minute, and was made in none."""
    searched(made=False, max_candidates=2)
    _, frame = searched(max_minutes=2.5)
    assert len(LOG) == 2, "two minutes are used, and a third candidate would take another"
    assert frame["left_out"].to_list()[:2] == [None, None]
    assert set(frame["left_out"].str.head(22).drop_nulls()) == {"max_minutes is 2.5: 2."}


@pytest.mark.slow
def test_the_first_candidate_is_trained_whatever_the_budget(searched):
    searched(made=False, max_candidates=1)
    _, frame = searched(max_minutes=0.5)
    assert frame["chosen"].to_list() == [True, False, False, False]


@pytest.mark.slow
def test_a_candidate_that_diverges_is_left_out(searched):
    FAILING["beta 4 rate 0.001"] = TrainingError("The training loss became nan.")
    _, frame = searched()
    assert frame["left_out"][2] == "The training loss became nan."
    assert frame["chosen"].to_list() == [False, False, False, True]


@pytest.mark.slow
def test_without_any_candidate_there_is_no_m_t(searched):
    FAILING.update(dict.fromkeys(WINS, TrainingError("The training loss became nan.")))
    with pytest.raises(FinalError, match="None of 4 candidates can become M_t: The training loss became nan"):
        searched()


@pytest.mark.slow
def test_candidates_train_side_by_side(searched):
    _, frame = searched(parallel=2)
    assert [gpu for _, gpu, _ in LOG] == [""] * 4
    assert not any(in_main_thread for *_, in_main_thread in LOG)
    assert sorted(tried()[:2]) == ["beta 2 rate 0.001", "beta 2 rate 0.003"]
    assert frame["value"].to_list() == [0.25, 0.5, 1.0, 0.75]


@pytest.mark.slow
def test_later_iterations_take_the_choice_of_the_first(searched):
    searched("0001", when="first")
    services, frame = searched("0002", when="first")
    assert tried()[4:] == ["beta 4 rate 0.001"]
    manifest = services.checkpoints.current("model_checkpoint", "0002").manifest
    assert manifest["settings"]["search"]["asset"] == "search_candidates[0001]"
    assert "candidate" not in manifest["parents"]
    assert set(frame["iteration"]) == {1}


@pytest.mark.slow
def test_without_a_first_search_there_is_no_choice_to_take(searched):
    with pytest.raises(FinalError, match=r"there was no search in iteration 1: materialize search_candidates\[0001\]"):
        searched("0002", when="first")


def test_a_judge_that_cannot_judge_chooses_nobody(tmp_path):
    services = services_in(tmp_path, with_search(**GRID))
    doubtful = Metric("held_out_accuracy", 0.5, of=BOTH_ENDED, low=0.3, high=0.7, n=20)
    measured(services, "judge_model", doubtful, partition=None)
    with pytest.raises(
        FinalError, match=r"search\.metric is `win_rate`.*A search would choose by chance: set the metric"
    ):
        refuse_doubtful_metric(services)
    refuse_doubtful_metric(dataclasses.replace(services, settings=with_search(**{**GRID, "metric": "instructions"})))


@pytest.mark.slow
def test_clean_keeps_candidates_until_m_t_is_made(searched, tmp_path):
    services, frame = searched(made=False)
    store = storage_root(tmp_path / "home" / "checkpoints")

    def candidates():
        in_use = _without_past_candidates(_current_manifests(store)).values()
        return {each["sha"] for each in in_use if each["asset"] == "search_candidates"}

    assert candidates() == set(frame["checkpoint_sha"])
    searched()
    assert candidates() == set()
    made = services.checkpoints.manifest("model_checkpoint", "0001")
    assert made["created"]


# The page and the card.


@pytest.mark.slow
def test_the_candidates_stand_in_report_and_card(searched):
    services, _ = searched(max_candidates=3)
    manifest = services.checkpoints.current("model_checkpoint", "0001").manifest
    rows = candidate_rows(manifest["settings"]["search"])
    assert len(HEAD) == len(rows[0])
    assert rows[2] == (
        "learning_rate 0.001, loss.beta 4.0",
        "100.0% (51.0 to 100.0)",
        "4",
        "4.000",
        "50.0%",
        "1.0",
        "chosen",
    )
    assert rows[3][0] == "learning_rate 0.003, loss.beta 4.0"
    assert rows[3][-1] == "left out: max_candidates is 3"
    assert chosen_text(manifest) == "learning_rate 0.001, loss.beta 4.0"
    assert chosen_values(manifest)["preference_optimization.loss.beta"] == "4.0"
    yaml.safe_dump(manifest)


# The graph, the estimate, and real processes.


def test_only_the_setting_brings_the_search_into_the_graph():
    graphs = [build(settings, Path("/nowhere"))[1].graph for settings in (active_settings(), with_search(**GRID))]
    assets = [{key.to_user_string() for key in graph.materializable_asset_keys} for graph in graphs]
    assert assets[1] - assets[0] == {"search_candidates"}
    (parents,) = [graphs[1].get(dg.AssetKey("model_checkpoint")).parent_keys]
    assert dg.AssetKey("search_candidates") in parents


def test_the_estimate_counts_the_candidates(nano_model):
    seed = pl.DataFrame({"split": ["train", "dev"], "prompt": ["a b"] * 2, "answer": ["c d"] * 2})

    def trained(settings, iteration):
        work = expected_work(sizes_of(settings, seed, 0))
        names = ("search_candidates", "model_checkpoint")
        return sum(item.in_iteration(iteration) for stage, item in work if stage.name in names and item.kind == "train")

    once, every = trained(active_settings(), 1), with_search(**GRID)
    assert trained(every, 1) == 4 * once
    assert trained(with_search(**GRID, max_candidates=2), 1) == 2 * once
    first = with_search(**GRID, when="first")
    assert (trained(first, 1), trained(first, 2)) == (4 * once, trained(active_settings(), 2))
    assert disk_needed(active_settings()) < disk_needed(first) < disk_needed(every)


def test_a_budget_smaller_than_one_candidate_is_refused(nano_model):
    seed = pl.DataFrame({"split": ["train", "dev"], "prompt": ["a b"] * 2, "answer": ["c d"] * 2})
    refuse_small_budget(sizes_of(with_search(**GRID, max_minutes=60), seed, 0))
    with pytest.raises(
        SettingsError, match=r"max_minutes is 1e-05, and the training of one candidate takes about .*: raise"
    ):
        refuse_small_budget(sizes_of(with_search(**GRID, max_minutes=1e-5), seed, 0))


@pytest.mark.slow
def test_trainings_side_by_side_are_those_that_run_alone(nano_checkpoint, tmp_path):
    trainer = Trainer(
        engine=Engine(threads=2, dtype="float32"),
        random_seed=1,
        processes=TrainingProcesses(),
        states=str(tmp_path / "training"),
    )
    both = trainer.side_by_side(2)
    assert [each.engine.threads for each in both] == [1, 1]
    losses = {}

    def train(name, each, beta):
        loss = SIMPO.model_copy(update={"beta": beta})
        (tmp_path / name).mkdir()
        summary = each.train("preference", nano_checkpoint, training_pairs(), PAIRED, tmp_path / name, loss)
        losses[name] = [entry["loss"] for entry in summary.history]

    threads = [
        threading.Thread(target=train, args=(f"beside {beta}", each, beta))
        for each, beta in zip(both, (2.5, 4.0), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for beta in (2.5, 4.0):
        train(f"alone {beta}", trainer, beta)
        assert losses[f"beside {beta}"] == pytest.approx(losses[f"alone {beta}"], abs=1e-4)
