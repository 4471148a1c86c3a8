"""What judges are trained on and tried on: no cue of ending, every kind of worse answer, and what is reached without reading."""

import dataclasses
import json

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resources.judging.judge_choice import INDEPENDENT
from synpo_assets.evaluation.win_rates import evaluation
from synpo_assets.graph import metrics
from synpo_assets.graph.metrics import Metric, Metrics, judge_doubt, record, recorded
from synpo_assets.method.damage import ending
from synpo_assets.method.judging import (
    ANOTHER_GOLD,
    BOTH_ENDED,
    KINDS,
    accuracy_by_kind,
    doubt,
    held_out_pairs,
    other_answers,
    training_pairs,
)
from synpo_assets.method.outcomes import win_rate_interval
from synpo_assets.reports.page import judging_rows
from synpo_assets.stages.scorers import judge_model, reward_model
from tests.benchmarks.judge_agreement import PEOPLE, agreements, decided_pairs
from tests.nano import seed_rows
from tests.stand_ins import instance as instance
from tests.stand_ins import shown
from tests.test_evaluation import materialize, stand_in


def answered(count=40, cut=lambda place: place % 2 == 0):
    """Gold of the seed, with answers that are cut or end."""
    rows = [
        {"prompt": row["prompt"], "answer": row["answer"], "cut": cut(place),
         "response": f"Number {place} is short. It does not e" if cut(place) else f"Number {place} says little."}
        for place, row in enumerate(seed_rows()[:count])
    ]  # fmt: skip
    return pl.DataFrame(rows)


@given(st.integers(0, 5))
def test_what_is_trained_on_never_tells_the_worse_answer_by_a_cut(seed):
    pairs = training_pairs(answered(), seed)
    gold = dict(answered().select("prompt", "answer").iter_rows())
    assert all(better == gold[prompt] != worse for prompt, better, worse in pairs)
    own = [worse for _, _, worse in pairs if worse.startswith("Number")]
    assert len(own) == 40
    assert {ending(worse) for worse in own} == {"."}
    golds = set(gold.values())
    damaged = [(better, worse) for _, better, worse in pairs if worse not in golds and not worse.startswith("Number")]
    assert len(damaged) >= 38
    assert all(ending(better) == ending(worse) for better, worse in damaged)
    assert sum(worse in golds for _, _, worse in pairs) == 40


def test_a_cut_answer_without_a_whole_sentence_and_an_empty_one_are_left_out():
    frame = answered(4).with_columns(response=pl.Series(["It does not e", "", "Ends.", "Is cut. But th"]))
    held_out = held_out_pairs(frame.with_columns(cut=pl.Series([True, False, False, True])), 0)
    worse = {kind: held_out.filter(kind=kind)["worse"].to_list() for kind in ("initial", BOTH_ENDED, "initial_trimmed")}
    assert worse == {
        "initial": ["It does not e", "Ends.", "Is cut. But th"], BOTH_ENDED: ["Ends.", "Is cut."], "initial_trimmed": ["Is cut."],
    }  # fmt: skip
    assert held_out.filter("cut")["worse"].to_list() == ["It does not e", "Is cut. But th"]


@given(st.lists(st.text(max_size=3), max_size=9, unique_by=str.strip))
def test_the_other_answers_are_all_answers_and_nobody_gets_their_own(answers):
    others = other_answers(answers)
    assert sorted(others) == sorted(answers)
    assert len(answers) < 2 or all(one != other for one, other in zip(answers, others, strict=True))


def accuracies(margin):
    pairs = held_out_pairs(answered(), 0)
    margins = pl.Series([margin(*row) for row in pairs.select("better", "worse", "cut").iter_rows()], dtype=pl.Float64)
    return {row["kind"]: row for row in accuracy_by_kind(pairs, margins).iter_rows(named=True)}


def test_a_judge_that_cannot_read_is_as_right_as_the_column_beside_it_says():
    by_length = accuracies(lambda better, worse, cut: len(better) - len(worse))
    by_ending = accuracies(lambda better, worse, cut: float(cut))
    assert list(by_length) == list(KINDS)
    for kind in KINDS:
        assert by_length[kind]["accuracy"] == by_length[kind]["length_alone"]
        assert by_ending[kind]["accuracy"] == by_ending[kind]["ending_alone"]
    # Half of M_0's answers are cut; where none is, their ending says nothing.
    assert by_ending["initial"]["ending_alone"] == 0.75
    assert {row["ending_alone"] for kind, row in by_ending.items() if kind != "initial"} == {0.5}
    # One direction for all kinds: what is left out is found by length, and what is added is not.
    assert (by_length["lost_item"]["length_alone"], by_length["repeated_item"]["length_alone"]) == (1.0, 0.0)


def test_golden_numbers_of_a_judge_that_knows_gold_from_answers_but_not_from_damaged_gold():
    found = accuracies(lambda better, worse, cut: 1.0 if worse.startswith("Number") else 0.0)
    whole, half = found[BOTH_ENDED], found["damaged"]
    assert (whole["pairs"], whole["accuracy"], found["initial_trimmed"]["pairs"]) == (40, 1.0, 20)
    assert (whole["low"], whole["high"]) == pytest.approx(win_rate_interval(pl.Series(["win"] * 40)))
    assert (half["accuracy"], half["pairs"]) == (0.5, 40)
    single = win_rate_interval(pl.Series(["win"] * 20 + ["loss"] * 20))
    assert single[0] < half["low"] < 0.5, "over prompts, each of which says more than one pair"
    assert found[ANOTHER_GOLD]["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("right", "pairs", "doubted"), [(16, 32, True), (21, 32, True), (23, 32, False), (5, 5, False), (0, 0, True)]
)
def test_a_judge_is_doubted_where_chance_may_have_done_it(right, pairs, doubted):
    low, high = win_rate_interval(pl.Series(["win"] * right + ["loss"] * (pairs - right), dtype=pl.String)) or (
        None,
        None,
    )
    sentence = doubt(right / pairs if pairs else None, low, high, pairs)
    assert (sentence is not None) == doubted
    if doubted:
        assert sentence.endswith("its win rates say nothing.")


def test_judge_and_scorer_say_how_often_they_are_right_about_each_kind(instance, tmp_path, monkeypatch):
    """The stand-in always finds gold better."""
    _, services, _ = materialize([reward_model, judge_model], instance, tmp_path, monkeypatch)
    once = recorded(services.metrics, "0002")
    for asset in ("judge_model", "reward_model"):
        found = once.find("held_out_accuracy", "initial", asset=asset)
        assert (found.value, found.n, found.high) == (1.0, 6, 1.0)
        ended = once.find("held_out_accuracy", BOTH_ENDED, asset=asset)
        assert (ended.value, ended.n) == (1.0, 6), "trimmed"
        null = once.find("held_out_accuracy", "initial", by="ending alone", asset=asset)
        assert (null.value, null.n) == (1.0, 6), "all of M_0's answers are cut"
        assert len(shown(instance, asset)["held_out_accuracy"].records) == len(KINDS)
    rows = {label: cells for label, *cells in judging_rows(once)}
    assert list(rows) == list(KINDS.values())
    assert rows[KINDS["initial"]] == ["6", "100.0% (61.0 to 100.0)", "100.0% (61.0 to 100.0)", "100.0%", "100.0%"]
    assert rows[KINDS[BOTH_ENDED]][-1] == "50.0%", "the cut is gone"


def test_in_place_of_the_win_rates_of_a_judge_at_chance_stands_a_sentence(instance, tmp_path, monkeypatch):
    scorers = [stand_in("reward_model", "F"), stand_in("judge_model", "J")]
    for accuracy, low in ((0.6, 0.42), (0.9, 0.76)):
        found = Metric("held_out_accuracy", accuracy, of=BOTH_ENDED, low=low, high=0.96, n=32)
        _, services, _ = materialize(scorers, instance, tmp_path / str(accuracy), monkeypatch)
        record(services.metrics, "judge_model", None, [found])
        assert (judge_doubt(services.metrics) is None) == (low > 0.5)
        materialize([*scorers, evaluation], instance, tmp_path / str(accuracy), monkeypatch)
        about = shown(instance, "evaluation", "0002")
        rate = about[f"win_rate of candidate over initial by {INDEPENDENT}"]
        assert (rate == judge_doubt(services.metrics)) if low < 0.5 else (rate == 1.0)
        by_scorer = about["win_rate of candidate over initial by scorer (took part in training)"]
        assert by_scorer == 1.0, "whoever took part is shown as before"


def test_readers_leave_out_the_rates_of_one_judge_and_keep_the_counts():
    rate = Metric("win_rate", 0.6, of="candidate", over="initial", by=INDEPENDENT, low=0.5, high=0.7, n=9)
    rows = [
        rate,
        dataclasses.replace(rate, by="another"),
        dataclasses.replace(rate, metric="wins", low=None, high=None),
    ]
    frame = pl.DataFrame(
        [{"asset": "evaluation", "iteration": 1} | dataclasses.asdict(row) for row in rows], schema=metrics.SCHEMA
    )
    left = Metrics(frame).without_rates_by(INDEPENDENT)
    without, other = left.every("win_rate")
    assert (without.value, without.low, without.high, without.n) == (None, None, None, 9)
    assert (other.value, left.value("wins", "candidate", over="initial", by=INDEPENDENT)) == (0.6, 0.6)


def test_agreement_with_people_counts_the_pairs_that_most_of_them_decide(tmp_path):
    """Two of three decide; a tie of the majority, or three verdicts, decide nothing."""
    verdicts = [(1, 1, 0), (2, 2, 2), (0, 0, 1), (0, 1, 2), (2, 0, 2)]
    rows = [
        {"instruction": f"Name {place}.", "input": "" if place else "Short.", "response1": "a plum",
         "response2": "pear" if place < 4 else "a longer pear", **dict(zip(PEOPLE, given, strict=True))}
        for place, given in enumerate(verdicts)
    ]  # fmt: skip
    (tmp_path / "people.json").write_text(json.dumps(rows))
    pairs, asked = decided_pairs(tmp_path / "people.json")
    assert (asked, pairs["people"].to_list(), pairs["prompt"][0]) == (5, [1, -1, -1], "Name 0.\n\nShort.")
    found = {(row["pairs"], row["by"]): row for row in agreements(pairs, pl.Series([1.0, 0.0, -2.0])).rows(named=True)}
    assert found["all", "judge"]["agreement"] == pytest.approx(2.5 / 3)
    assert found["all", "longer wins"]["agreement"] == pytest.approx(2 / 3)
    assert found["all", "always first"]["agreement"] == pytest.approx(1 / 3)
    assert [found["like length", by]["n"] for by in ("judge", "longer wins")] == [0, 0]


@given(st.lists(st.sampled_from(["yes", "no", " no", "maybe"]), max_size=12))
def test_another_answer_is_another_text_wherever_there_is_one(answers):
    others = other_answers(answers)
    assert len(others) == len(answers)
    if len({each.strip() for each in answers}) > 1:
        assert all(other.strip() != own.strip() for other, own in zip(others, answers, strict=True))
    assert set(others) <= set(answers)
