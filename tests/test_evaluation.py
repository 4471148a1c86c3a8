"""Win rates, who judges them, and what each judge may have read: pure functions, stand-in stages, a small HTTP server."""

import copy
import dataclasses
import datetime
import json
import math
import os
import re
import threading
from types import SimpleNamespace
from typing import ClassVar

import dagster as dg
import numpy as np
import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from resources.common.errors import FinalError
from resources.generation.language_model import Usage
from resources.generation.server_answers import ChatAnswer
from resources.judging.judge_choice import INDEPENDENT, TOOK_PART, judge_scorer, open_judges
from resources.judging.server_judge import ServerJudge, load_template
from resources.scoring.pair_ranker import PairRanker
from resources.scoring.scorer import SCORERS, Comparison, RewardScorer, ScoringUsage
from resources.scoring.scoring_model import Reading
from resources.settings.evaluation import JudgeServer
from resources.settings.files import load_settings, preset_path
from resources.settings.method import PairRankerScorer
from resources.settings.sections import SettingsError
from resources.storage.checkpoint_store import Checkpoint, CheckpointStore
from resources.training.job import TrainingSummary
from synpo_assets.cli.preflight import check_before_run
from synpo_assets.evaluation.win_rates import COMPARISONS, evaluation
from synpo_assets.graph.evaluation_schemas import Evaluation
from synpo_assets.graph.metrics import recorded
from synpo_assets.graph.tables import check
from synpo_assets.method.evaluation import win_rates, wins_by_ending
from synpo_assets.method.length_control import alike_in_length, length_controlled_interval, length_controlled_win_rate
from synpo_assets.method.outcomes import NO_VERDICT, outcomes, win_rate, win_rate_interval
from synpo_assets.method.seed import HELD_OUT
from synpo_assets.stages.improver import seed_responses
from synpo_assets.stages.prompts import prompt_generator
from synpo_assets.stages.scorers import judge_model, reward_model
from synpo_assets.stages.seed import seed_table
from tests.nano import active_settings, write_settings
from tests.stand_ins import ITERATIONS, run, services_in, shown, without_rules
from tests.stand_ins import instance as instance
from tests.test_server_engine import FaultyServer

pytestmark = pytest.mark.usefixtures("short_pauses")

OUTCOME = st.sampled_from(["win", "tie", "loss"])
JUDGED = st.lists(st.tuples(OUTCOME, st.integers(0, 500), st.integers(0, 500)), min_size=1, max_size=40)
EXCHANGED = {"win": "loss", "tie": "tie", "loss": "win", NO_VERDICT: NO_VERDICT}


def columns(rows):
    outcome, lengths, others = zip(*rows, strict=True)
    return pl.Series(outcome), pl.Series(lengths), pl.Series(others)


def exchanged(judged):
    return pl.Series([EXCHANGED[outcome] for outcome in judged])


@given(JUDGED)
def test_exchanging_the_sides_gives_the_rest_of_each_rate(rows):
    judged, lengths, others = columns(rows)
    assert win_rate(judged) + win_rate(exchanged(judged)) == pytest.approx(1)
    controlled = length_controlled_win_rate(judged, lengths, others)
    assert controlled + length_controlled_win_rate(exchanged(judged), others, lengths) == pytest.approx(1, abs=1e-8)
    low, high = win_rate_interval(judged)
    other_low, other_high = win_rate_interval(exchanged(judged))
    assert (1 - other_high, 1 - other_low) == pytest.approx((low, high), abs=1e-12)


@given(JUDGED)
def test_the_interval_contains_the_rate_and_always_has_a_width(rows):
    judged, _, _ = columns(rows)
    low, high = win_rate_interval(judged)
    assert 0 <= low <= win_rate(judged) <= high <= 1
    assert high - low > 1 / (2 * len(rows)), "half an answer is never certain"
    assert win_rate_interval(judged.sort()) == (low, high), "the order of prompts does not count"


@pytest.mark.parametrize("outcome", ["win", "tie", "loss"])
@pytest.mark.parametrize("count", [1, 20, 1000])
def test_outcomes_that_are_all_the_same_leave_a_width(outcome, count):
    low, high = win_rate_interval(pl.Series([outcome] * count))
    # Wilson's interval of a share of 0 or 1; with ties only it is half as far on each side.
    far = 1.959964**2 / (count + 1.959964**2)
    wanted = {"win": (1 - far, 1), "tie": (0.5 - far / 2, 0.5 + far / 2), "loss": (0, far)}[outcome]
    assert (low, high) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(("wins", "losses"), [(16, 16), (29, 3), (64, 20), (1, 5)])
def test_without_ties_the_interval_is_that_of_wilson(wins, losses):
    z, count = 1.959964, wins + losses
    rate, middle = wins / count, (wins + z**2 / 2) / (count + z**2)
    far = z / (1 + z**2 / count) * (rate * (1 - rate) / count + z**2 / (4 * count**2)) ** 0.5
    judged = pl.Series(["win"] * wins + ["loss"] * losses)
    assert win_rate_interval(judged) == pytest.approx((middle - far, middle + far), abs=1e-6)


@pytest.mark.parametrize(("rate", "ties"), [(0.5, 0), (0.5, 0.4), (0.5, 0.9), (0.9, 0), (0.9, 0.15), (1.0, 0)])
def test_the_interval_covers_the_true_rate(rate, ties):
    draw, prompts = np.random.default_rng(3), 32
    shares = [rate - ties / 2, ties, max(1 - rate - ties / 2, 0)]
    intervals, covered, times = {}, 0, 4000
    for counts in map(tuple, draw.multinomial(prompts, shares, size=times)):
        if counts not in intervals:
            outcome = [name for name, count in zip(EXCHANGED, counts, strict=False) for _ in range(count)]
            intervals[counts] = win_rate_interval(pl.Series(outcome))
        low, high = intervals[counts]
        covered += low <= rate <= high
    assert covered / times >= 0.92
    if rate < 1:
        assert covered / times <= 0.985, "it is no wider than needed"


@given(JUDGED)
def test_equal_lengths_leave_the_rate_but_for_the_prior(rows):
    judged, lengths, _ = columns(rows)
    points = win_rate(judged) * len(rows)
    wanted = (points + 0.5) / (len(rows) + 1)
    assert length_controlled_win_rate(judged, lengths, lengths) == pytest.approx(wanted, abs=1e-8)
    assert length_controlled_win_rate(judged, lengths + 7, lengths) == pytest.approx(wanted, abs=1e-8)


@given(JUDGED, st.integers(1, 30), st.integers(0, 500))
def test_what_has_no_verdict_counts_for_neither_side(rows, count, length):
    judged, lengths, others = columns(rows)
    with_nonsense = pl.concat([judged, pl.Series([NO_VERDICT] * count)])
    more = pl.concat([lengths, pl.Series([length] * count)]), pl.concat([others, pl.Series([0] * count)])
    assert win_rate(with_nonsense) == win_rate(judged)
    assert win_rate_interval(with_nonsense) == win_rate_interval(judged)
    assert length_controlled_win_rate(with_nonsense, *more) == length_controlled_win_rate(judged, lengths, others)


@settings(deadline=None, max_examples=25)
@given(JUDGED)
@example([("win", 10, 0), ("tie", 29, 0)])
def test_the_length_controlled_rate_is_the_optimum_that_another_optimizer_finds(rows):
    import torch

    judged, lengths, others = columns(rows)
    difference = torch.tensor((lengths - others).to_list(), dtype=torch.float64)
    spread = difference.std(correction=0)
    feature = torch.tanh(difference / spread) if spread > 0 else torch.zeros_like(difference)
    points = torch.tensor([{"win": 1.0, "tie": 0.5, "loss": 0.0}[outcome] for outcome in judged], dtype=torch.float64)
    found = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [found], max_iter=500, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def cost():
        optimizer.zero_grad()
        logits = torch.cat([found[0] + found[1] * feature, found])
        target = torch.cat([points, torch.tensor([0.5, 0.5], dtype=torch.float64)])
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")
        value.backward()
        return value

    optimizer.step(cost)
    wanted = torch.sigmoid(found[0]).item()
    assert length_controlled_win_rate(judged, lengths, others) == pytest.approx(wanted, abs=1e-5)


def test_a_judge_that_goes_by_length_alone_sees_no_advantage_any_more():
    draw = np.random.default_rng(0)
    lengths, others = draw.integers(100, 500, 400) + 80, draw.integers(100, 500, 400)
    judged = outcomes(pl.Series(lengths - others))
    assert win_rate(judged) > 0.65
    assert length_controlled_win_rate(judged, pl.Series(lengths), pl.Series(others)) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("count", [1, 2, 3, 5000])
def test_estimates_exist_where_length_tells_all_wins_from_all_losses(count):
    judged = pl.Series(["win"] * count + ["loss"] * count)
    lengths = pl.Series([90] * count + [10] * count)
    assert length_controlled_win_rate(judged, lengths, pl.Series([50] * 2 * count)) == pytest.approx(0.5)
    assert 0.5 < length_controlled_win_rate(judged[:count], lengths[:count], lengths[:count]) < 1


def test_the_interval_is_near_that_of_resampled_prompts_and_narrows_with_more_of_them():
    judged = pl.Series(["win"] * 30 + ["tie"] * 10 + ["loss"] * 24)
    points = np.array([1.0] * 30 + [0.5] * 10 + [0.0] * 24)
    draw = np.random.default_rng(5)
    resampled = [draw.choice(points, len(points)).mean() for _ in range(10_000)]
    # In the middle and with enough prompts, both ways give nearly the same.
    assert win_rate_interval(judged) == pytest.approx(np.quantile(resampled, [0.025, 0.975]), abs=0.01)
    few, many = (win_rate_interval(pl.concat([judged] * times)) for times in (1, 16))
    assert (many[1] - many[0]) == pytest.approx((few[1] - few[0]) / 4, rel=0.1)


def by_length(draw, prompts, intercept, slope):
    """Outcomes of a judge who sees content (the intercept) and length."""
    others = draw.integers(100, 500, prompts)
    lengths = np.maximum(others + draw.normal(80, 120, prompts).astype(int), 1)
    feature = np.tanh((lengths - others) / (lengths - others).std())
    won = draw.random(prompts) < 1 / (1 + np.exp(-intercept - slope * feature))
    return pl.Series(np.where(won, "win", "loss")), pl.Series(lengths), pl.Series(others)


def test_the_length_controlled_interval_is_that_of_estimates_on_resampled_prompts():
    draw = np.random.default_rng(2)
    judged, lengths, others = by_length(draw, 200, 0.3, 1.5)
    rates = []
    for _ in range(300):
        places = draw.integers(0, 200, 200)
        rates.append(length_controlled_win_rate(judged[places], lengths[places], others[places]))
    found = length_controlled_interval(judged, lengths, others, 0)
    assert found == pytest.approx(np.quantile(rates, [0.025, 0.975]), abs=0.025)
    assert found == length_controlled_interval(judged, lengths, others, 0)
    order = draw.permutation(200)
    assert found == pytest.approx(length_controlled_interval(judged[order], lengths[order], others[order], 0), abs=1e-9)


def test_the_length_controlled_interval_covers_the_rate_of_content_alone():
    draw, covered, times = np.random.default_rng(4), 0, 30
    for random_seed in range(times):
        low, high = length_controlled_interval(*by_length(draw, 60, 0.8, 1.5), random_seed)
        covered += low <= 1 / (1 + np.exp(-0.8)) <= high
    assert covered >= 0.85 * times


@pytest.mark.parametrize("count", [1, 20])
def test_prompts_that_were_all_won_leave_the_length_controlled_interval_a_width(count):
    same = pl.Series([50] * count)
    low, high = length_controlled_interval(pl.Series(["win"] * count), same, same, 0)
    assert low <= (count - 0.5) / (count + 1)
    assert high == pytest.approx((count + 0.5) / (count + 1))


def test_answers_are_alike_in_length_within_a_fifth_or_a_quarter():
    lengths, others = pl.Series([80, 79, 125, 126, 0, 0, 100]), pl.Series([100, 100, 100, 100, 0, 1, 100])
    assert [alike_in_length(pl.Series(["tie"]), lengths[[n]], others[[n]]) for n in range(7)] == [1, 0, 1, 0, 1, 0, 1]
    assert alike_in_length(pl.Series(["win", NO_VERDICT]), lengths[[0, 6]], others[[0, 6]]) == 1


@pytest.mark.parametrize("judged", [[], [NO_VERDICT] * 3])
def test_without_any_verdict_there_is_no_rate(judged):
    judged = pl.Series(judged, dtype=pl.String)
    lengths = pl.Series([1] * len(judged), dtype=pl.Int64)
    assert win_rate(judged) is win_rate_interval(judged) is None
    assert length_controlled_win_rate(judged, lengths, lengths) is None
    assert length_controlled_interval(judged, lengths, lengths, 0) is None


def test_a_score_that_is_not_a_number_is_no_win():
    assert outcomes(pl.Series([float("nan"), float("inf"), None])).to_list() == [NO_VERDICT, "win", NO_VERDICT]
    assert outcomes(pl.Series([None, None])).to_list() == [NO_VERDICT] * 2


def test_golden_numbers_of_a_table():
    frame = pl.DataFrame({
        "prompt_id": ["a", "b", "c", "d"],
        "verbose_response": ["long answer", "b", "cc", "dd"], "initial_response": ["x", "yy", "zz", "w"],
        "judge_verbose_over_initial": ["win", "loss", "tie", NO_VERDICT], "scorer_verbose_over_initial": ["win"] * 4,
    })  # fmt: skip
    rates = win_rates(frame, {"judge": "independent", "scorer": "took part"}, [("verbose", "initial")], 3)
    (judge, scorer) = rates.to_dicts()
    counts = ("judge", "label", "model", "opponent", "wins", "ties", "losses", "no_verdict", "prompts", "win_rate")
    assert tuple(judge[name] for name in counts) == ("judge", "independent", "verbose", "initial", 1, 1, 1, 1, 3, 0.5)
    of_length = ("length_controlled", "length_controlled_low", "length_controlled_high")
    assert [judge[name] for name in of_length] == [scorer[name] for name in of_length] == [None] * 3, (
        "three of four pairs differ"
    )
    frames = pl.concat([frame.with_columns(pl.col("prompt_id") + str(number)) for number in range(10)])
    (of_forty, *_) = win_rates(frames, {"judge": "independent"}, [("verbose", "initial")], 3).to_dicts()
    assert of_forty["alike_in_length"] == 10
    assert of_forty["length_controlled"] == pytest.approx(0.3569, abs=1e-4)
    assert of_forty["length_controlled_low"] < of_forty["length_controlled"] < of_forty["length_controlled_high"]
    assert (judge["alike_in_length"], scorer["alike_in_length"]) == (1, 1)
    assert (judge["low"], judge["high"]) == pytest.approx((0.1538, 0.8462), abs=1e-4)
    assert tuple(scorer[name] for name in ("wins", "prompts", "win_rate")) == (4, 4, 1.0)
    assert (scorer["low"], scorer["high"]) == pytest.approx((0.5101, 1.0), abs=1e-4)


def test_wins_are_counted_by_which_answers_ended():
    cells = [(False, False)] * 3 + [(False, True)] * 2 + [(True, False)] + [(True, True)] * 2
    frame = pl.DataFrame(cells, schema=["candidate_cut", "initial_cut"], orient="row").with_columns(
        judge_over_initial=pl.Series(["win", "win", "tie", "win", "loss", "loss", "tie", NO_VERDICT]),
        prompt_id=pl.Series(list("abcdefgh")),
    )
    rows = wins_by_ending(frame, {"judge": "independent"}).to_dicts()
    assert [tuple(row[name] for name in ("ended", "wins", "ties", "losses", "prompts", "win_rate")) for row in rows] == [
        ("both_ended", 2, 1, 0, 3, pytest.approx(5 / 6)), ("only_candidate_ended", 1, 0, 1, 2, 0.5),
        ("only_initial_ended", 0, 0, 1, 1, 0.0), ("neither_ended", 0, 1, 0, 1, 0.5),
    ]  # fmt: skip
    assert (rows[0]["low"], rows[0]["high"]) == win_rate_interval(pl.Series(["win", "win", "tie"]))
    nobody = wins_by_ending(frame.filter("candidate_cut"), {"judge": "independent"}).to_dicts()[0]
    assert (nobody["prompts"], nobody["win_rate"], nobody["low"]) == (0, None, None)


# Several answers to a prompt.


@given(JUDGED, st.integers(2, 4))
def test_answers_that_repeat_each_other_count_once(rows, times):
    judged, _, _ = columns(rows)
    prompts = pl.Series(range(len(judged)))
    once = win_rate_interval(judged)
    assert win_rate_interval(judged, prompts) == pytest.approx(once, abs=1e-9)
    repeated, of = pl.concat([judged] * times), pl.concat([prompts] * times)
    assert win_rate_interval(repeated, of) == pytest.approx(once, abs=1e-9)


def test_answers_that_have_nothing_to_do_with_each_other_count_in_full():
    judged = pl.Series(["win", "loss"] * 30)
    prompts = pl.Series([number // 2 for number in range(60)])
    assert win_rate_interval(judged, prompts) == win_rate_interval(judged)


def test_the_interval_over_prompts_covers_the_true_rate():
    draw, covered, treated_as_independent = np.random.default_rng(5), 0, 0
    for _ in range(400):
        # Prompts differ: one is won nearly always, another hardly ever.
        chances = np.repeat(draw.beta(1.2, 0.8, 40), 4)
        judged = pl.Series(np.where(draw.random(160) < chances, "win", "loss"))
        for prompts in (pl.Series(np.repeat(np.arange(40), 4)), None):
            low, high = win_rate_interval(judged, prompts)
            covered += prompts is not None and low <= 0.6 <= high
            treated_as_independent += prompts is None and low <= 0.6 <= high
    assert covered / 400 >= 0.92
    assert treated_as_independent / 400 < 0.85, "the same without regard to prompts misses often"


def test_the_length_controlled_interval_draws_prompts_and_not_answers():
    judged, lengths, others = by_length(np.random.default_rng(2), 40, 0.4, 1.5)
    prompts = pl.Series(range(40))
    found = length_controlled_interval(judged, lengths, others, 0)
    assert length_controlled_interval(judged, lengths, others, 0, prompts) == found
    thrice = [pl.concat([each] * 3) for each in (judged, lengths, others)]
    clustered = length_controlled_interval(*thrice, 0, pl.concat([prompts] * 3))
    alone = length_controlled_interval(*thrice, 0)
    assert clustered[1] - clustered[0] == pytest.approx(found[1] - found[0], rel=0.2)
    assert alone[1] - alone[0] < 0.75 * (clustered[1] - clustered[0])


# Who reads which rows of the seed.


def laptop_with(tmp_path, **seed_data):
    return load_settings(write_settings(tmp_path / "mine.yaml", {"preset": "laptop", "seed_data": seed_data}))


@pytest.mark.parametrize(("limits", "sizes"), [
    ({}, (80, 80, 80)),
    ({"judge_limit": 200}, (80, 170, 80)),
    ({"judge_limit": 200, "scorer_limit": 200}, (80, 125, 125)),
    ({"train_limit": None, "judge_limit": None, "scorer_limit": None}, (166, 82, 82)),
    ({"train_limit": 300}, (170, 80, 80)),
    ({"train_limit": None, "judge_limit": 300}, (165, 85, 80)),
])  # fmt: skip
def test_judge_and_scorer_get_rows_that_training_leaves_and_at_most_half(tmp_path, limits, sizes):
    frame, _ = seed_table(laptop_with(tmp_path, **{"train_limit": 80, "judge_limit": 80, "scorer_limit": 80} | limits))
    counts = dict(frame.group_by("split").len().iter_rows())
    assert (counts["train"], counts["judge"], counts["scorer"]) == sizes
    assert frame["prompt_id"].is_unique().all()


@pytest.mark.parametrize(("published", "aside"), [
    ({"scorer"}, {"judge": 16}), ({"judge"}, {"scorer": 16}), ({"scorer", "judge"}, {}),
])  # fmt: skip
def test_rows_are_set_aside_only_for_what_is_trained_here(tmp_path, published, aside):
    sections = {name: {"kind": "pretrained", "name": "a/b"} for name in published}
    frame, _ = seed_table(load_settings(write_settings(tmp_path / "published.yaml", {"preset": "laptop", **sections})))
    assert dict(frame.group_by("split").len().iter_rows()) == {"train": 40, "dev": 8, "test": 8} | aside
    # Generator and improver read the same rows whoever scores and judges.
    assert frame.filter(split="train").equals(seed_table(laptop_with(tmp_path))[0].filter(split="train"))


def test_setting_rows_aside_does_not_change_what_is_trained_on(tmp_path):
    trained_on = [
        seed_table(laptop_with(tmp_path, judge_limit=limit, scorer_limit=limit))[0].filter(split="train")
        for limit in (2, 80, 250)
    ]
    assert trained_on[0].equals(trained_on[1])
    assert trained_on[0].equals(trained_on[2])


def test_too_few_rows_for_training_and_judge_are_refused(tmp_path):
    rows = [{"prompt": f"question {number}", "answer": "yes"} for number in range(8)]
    file = tmp_path / "few.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    frame, _ = seed_table(laptop_with(tmp_path, train={"path": "few.jsonl"}))
    counts = {"judge": 2, "scorer": 2, "train": 4}
    assert dict(frame.filter(~pl.col("split").is_in(HELD_OUT)).group_by("split").len().iter_rows()) == counts
    file.write_text("\n".join(json.dumps(row) for row in rows[:7]))
    words = r"7 usable rows; at least 8 are needed, 2 of them for the judge, 2 of them for the scorer\."
    with pytest.raises(SettingsError, match=words):
        seed_table(laptop_with(tmp_path, train={"path": "few.jsonl"}))


def test_a_held_out_prompt_that_the_judge_would_read_is_refused(tmp_path):
    """Whatever row it is: the file is compared before rows are set aside."""
    held_out = [{"prompt": f"held {number}?", "answer": "yes"} for number in range(2)]
    train = [{"prompt": f"question {number}?", "answer": "no"} for number in range(10)]
    (tmp_path / "held_out.jsonl").write_text("\n".join(json.dumps(row) for row in held_out))
    for place in range(10):
        rows = [*train[:place], {"prompt": " HELD  1? ", "answer": "no"}, *train[place:]]
        (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        sources = {"train": {"path": "train.jsonl"}, "held_out": {"path": "held_out.jsonl"}}
        with pytest.raises(
            SettingsError, match=rf"train line {place + 1}: the same prompt stands in line 2 of held_out"
        ):
            seed_table(laptop_with(tmp_path, **sources))
        frame, _ = seed_table(laptop_with(tmp_path, **sources, on_bad_rows="drop"))
        assert frame.filter(pl.col("prompt").str.to_lowercase().str.contains("held"))["split"].to_list() == [
            "dev",
            "test",
        ]


def test_a_training_prompt_that_overlaps_with_a_held_out_one_is_refused(tmp_path):
    """Eight words in a row are enough, wherever they stand; fewer are not."""
    asked = "Which four planets of the solar system have rings around them?"
    overlapping = "Quiz: which FOUR planets of the solar system have moons?"
    other = "Which four planets of the solar family have moons?"
    (tmp_path / "held_out.jsonl").write_text(
        "\n".join(json.dumps({"prompt": prompt, "answer": "yes"}) for prompt in (asked, "Why?"))
    )
    train = [*(f"why {number}?" for number in range(5)), overlapping, other, "why 5?", "why 6?"]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"prompt": prompt, "answer": "no"}) for prompt in train))
    sources = {"train": {"path": "train.jsonl"}, "held_out": {"path": "held_out.jsonl"}}
    with pytest.raises(
        SettingsError,
        match=r"train line 6: it shares 8 words in a row .* the held-out prompt .*/train\.jsonl and [^,]*/held_out\.jsonl, or",
    ):
        seed_table(laptop_with(tmp_path, **sources))
    frame, dropped = seed_table(laptop_with(tmp_path, **sources, on_bad_rows="drop"))
    assert [row.line for row in dropped] == [6]
    assert overlapping not in frame["prompt"]
    assert other in frame["prompt"]


CHECKPOINT = Checkpoint("initial_policy", None, "0123456789abcdef", "", "")


SPLITS = ("train", "judge", "scorer", *HELD_OUT)


class Recorder:
    """Stands in for all models and trainers, and keeps what each asset showed to it."""

    written: ClassVar = {"M_0": ("By M_0. And th", "length")}  # And why it ended.

    def __init__(self, shards):
        self.shards, self.engine, self.random_seed = str(shards), active_settings().engine, 42
        self.answered, self.trained, self.compared, self.seeds = {}, {}, {}, {}

    def note(self, kind, texts):
        asset = dg.AssetExecutionContext.get().asset_key.to_user_string()
        splits = {split for split in SPLITS if any(f"{split} seed" in text for text in texts)}
        kind[asset] = kind.get(asset, set()) | splits

    def answer(self, checkpoint, prompts, sampling):
        asked = list(prompts)
        self.note(self.answered, [messages[0]["content"] for _, messages in asked])
        with open(f"{checkpoint.weights}/model.safetensors") as file:
            name = file.read()
        text, ending = self.written.get(name, (f"by {name}", "stop"))
        tokens = {"input_tokens": pl.lit(3, pl.Int64), "output_tokens": pl.lit(4, pl.Int64)}
        frame = pl.DataFrame({"id": [row_id for row_id, _ in asked], "text": text})
        return frame.with_columns(finish_reason=pl.lit(ending), **tokens), Usage(len(asked), 0, 3, 4, 4, 0, 1.0)

    def train(self, kind, start, examples, training, directory, loss=None):
        texts = [example[0 if kind == "reward" else 1] for example in examples]
        self.note(self.trained, texts)
        self.seeds[dg.AssetExecutionContext.get().asset_key.to_user_string()] = self.random_seed
        weights(f"trained {self.random_seed}")(directory)
        return TrainingSummary(len(texts), 0, 0, 9, 1, 1.0, [{"loss": 1.0, "step": 1}])

    def model_copy(self, update):
        copied = copy.copy(self)
        copied.random_seed = update["random_seed"]
        return copied

    def compare(self, model, rows, judging=False):
        rows = list(rows)
        self.note(self.compared, [prompt for prompt, _, _ in rows])
        scores = pl.Series([1.0] * len(rows))
        return Comparison(scores, scores - 1, "reward_difference", ScoringUsage(1, 0, 1, 0, 0, 1.0))


PLANTS = (("birch", "gravel"), ("melon", "sand"), ("tulip", "clay"))
SEED = pl.DataFrame(
    [
        {"prompt_id": f"prompt-{split}{line}", "prompt": f"How does the {split} seed of a {plant} grow in {soil}?",
         "answer": f"Slowly, as the {split} seed does.", "split": split, "line": line}
        for split in SPLITS for line, (plant, soil) in enumerate(PLANTS, 1)
    ],
    schema_overrides={"line": pl.Int64},
)  # fmt: skip


def weights(text):
    def build(directory):
        (directory / "merged").mkdir()
        (directory / "merged" / "model.safetensors").write_text(text)

    return build


def stand_in(name, text, partitions=None):
    @dg.asset(name=name, partitions_def=partitions, io_manager_key="checkpoints")
    def made(context: dg.AssetExecutionContext, checkpoints: dg.ResourceParam[CheckpointStore]) -> Checkpoint:
        return checkpoints.create(context, weights(text), parents={}, trained_on={}, settings={}, random_seed=0)[0]

    return made


@dg.asset(io_manager_key="tables")
def seed_pairs() -> pl.DataFrame:
    return without_rules(SEED)


MODELS = [stand_in("initial_policy", "M_0"), stand_in("policy", "M_1", ITERATIONS),
          stand_in("model_checkpoint", "M_2", ITERATIONS), seed_pairs]  # fmt: skip


def materialize(assets, instance, home, monkeypatch, scorer=None, **sections):
    """Runs real assets of iteration 2 on models that stand in; returns what they showed to these, services and result."""
    seen, shared = Recorder(home / "shards"), active_settings()
    for module in ("synpo_assets.stages.scorers", "resources.judging.judge_choice"):
        monkeypatch.setattr(f"{module}.judge_scorer", lambda judge, scorer: scorer)
    services = services_in(home, shared.model_copy(update=sections))
    services = dataclasses.replace(services, language_model=seen, scorer=scorer or seen, trainer=seen)
    return seen, services, run([*MODELS, *assets], instance, services, "0002")


def test_no_stage_trains_on_or_compares_rows_of_another_split(instance, tmp_path, monkeypatch):
    stages = [prompt_generator, reward_model, judge_model, seed_responses, evaluation]
    seen, _, _ = materialize(stages, instance, tmp_path, monkeypatch)
    assert seen.trained == {"prompt_generator": {"train"}, "reward_model": {"scorer"}, "judge_model": {"judge"}}
    # M_0 answers the rows of scorer and judge in one batch, whichever is made first.
    aside = {"scorer", "judge", *HELD_OUT}
    assert seen.answered == {
        "reward_model": aside, "judge_model": aside, "seed_responses": {"train"}, "evaluation": set(HELD_OUT),
    }  # fmt: skip
    assert seen.compared == {
        "reward_model": set(HELD_OUT), "judge_model": set(HELD_OUT), "seed_responses": {"train"},
        "evaluation": set(HELD_OUT),
    }  # fmt: skip
    assert seen.seeds == {"prompt_generator": 42, "reward_model": 42, "judge_model": 43}


@pytest.mark.parametrize(("text", "ending", "outcome"), [("No end in si", "length", NO_VERDICT), ("", "stop", "win")])
def test_nothing_that_is_left_of_a_cut_answer_has_no_verdict(instance, tmp_path, monkeypatch, text, ending, outcome):
    """And an answer that is empty because the model wrote nothing is judged like any other."""
    monkeypatch.setattr(Recorder, "written", {"M_2": (text, ending)}, raising=False)
    scorers = [stand_in("reward_model", "F"), stand_in("judge_model", "J")]
    _, services, result = materialize([*scorers, evaluation], instance, tmp_path, monkeypatch)
    frame = result.output_for_node("evaluation")
    assert frame["candidate_response"].to_list() == [""] * 6
    assert set(frame["judge_over_initial"]) == {outcome}
    assert set(frame["judge_verbose_over_initial"]) == {"win"}
    none = recorded(services.metrics, "0002").value("no_verdicts", "candidate", over="initial", by=INDEPENDENT)
    assert none == (3 if outcome == NO_VERDICT else 0)


# Judges behind one interface.

ROWS = [("Which?", "good answer", "poor one"), ("And?", "poor", "good"), ("Now?", "good a", "good b")]


class ChatServer(FaultyServer):
    """Answers chats as `judge` does, a function of the two answers shown."""

    def __init__(self, judge):
        super().__init__()
        self.judge = judge

    def reply(self, body):
        shown = re.findall(r"<answer_[ab]>\n(.*?)\n</answer_[ab]>", body["messages"][0]["content"], re.DOTALL)
        # What only asks whether the server is well shows none.
        message = {"role": "assistant", "content": self.judge(*shown or ("", ""))}
        usage = {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100}
        return {"id": "1", "object": "chat.completion", "choices": [{"index": 0, "message": message}], "usage": usage}


@pytest.fixture
def serve():
    servers = []

    def serve(judge):
        server = ChatServer(judge)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return server

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def asked(server, shards, shard_rows=256, **options):
    return ServerJudge(JudgeServer(url=server.url, model="judge", **options), str(shards), shard_rows)


def better(answer):
    return json.dumps({"better": answer})


def honest(a, b):
    return better("tie" if ("good" in a) == ("good" in b) else "A" if "good" in a else "B")


def verdicts(judge):
    compared = judge.compare(ROWS)
    assert compared.margins.to_list() == [
        None if first is None else 2 * first - 1 for first in compared.first_scores.to_list()
    ]
    return outcomes(compared.margins).to_list()


def test_a_server_is_asked_in_both_orders_with_a_schema(serve, tmp_path):
    server = serve(honest)
    judge = asked(server, tmp_path)
    compared = judge.compare(ROWS)
    assert outcomes(compared.margins).to_list() == ["win", "loss", "tie"]
    assert (compared.usage.readings, compared.usage.tokens, compared.usage.reused) == (6, 600, 0)
    assert len(server.bodies) == 6
    for body in server.bodies:
        assert (body["model"], body["temperature"]) == ("judge", 0)
        schema = body["response_format"]["json_schema"]
        assert schema["strict"]
        assert schema["schema"]["properties"]["better"]["enum"] == ["A", "B", "tie"]
        assert schema["schema"]["additionalProperties"] is False
    places = [re.findall(r"good answer|poor one", body["messages"][0]["content"]) for body in server.bodies]
    assert sorted(found for found in places if found) == [["good answer", "poor one"], ["poor one", "good answer"]]


@pytest.mark.parametrize("judge", [
    lambda a, b: better("A"), lambda a, b: better("B"),
    # A tie in one order and a win in the other disagree too.
    lambda a, b: better("A" if (a > b and "good" in a) else "tie"),
])  # fmt: skip
def test_where_the_orders_disagree_there_is_a_tie(serve, tmp_path, judge):
    assert verdicts(asked(serve(judge), tmp_path)) == ["tie"] * 3


@pytest.mark.parametrize("nonsense", [
    "Answer A is better.", "", None, "A", '{"better": "C"}', '{"better": "A", "worse": "B"}', "[1", '{"better": "A"} or so',
])  # fmt: skip
def test_nonsense_is_counted_and_no_win(serve, tmp_path, said, nonsense):
    assert verdicts(asked(serve(lambda a, b: nonsense), tmp_path)) == [NO_VERDICT] * 3
    assert any("6 of 6 replies of judge (on a server) are no verdict" in message for message in said)


@pytest.mark.parametrize(
    "around",
    [
        "```json\n{}\n```", "```\n{}\n```", "<think>\nA? B?\n</think>\n\n{}", " <think></think>```json\n{}\n```",
        'hm, {"better": "tie"}?\n</think>\n{}', "Here is my verdict: {}", "With {braces} at first.\n```json\n{}\n```",
    ],
)  # fmt: skip
def test_what_servers_put_around_a_verdict_is_taken_off(serve, tmp_path, around):
    wrapped = serve(lambda a, b: around.replace("{}", honest(a, b)))
    assert verdicts(asked(wrapped, tmp_path)) == ["win", "loss", "tie"]


def test_fields_of_a_request_are_added_replaced_and_left_out(serve, tmp_path):
    server, fields = serve(honest), {"temperature": None, "max_tokens": None, "max_completion_tokens": 4000}
    judge = asked(server, tmp_path, extra_body=fields)
    assert verdicts(judge) == ["win", "loss", "tie"]
    for body in server.bodies:
        assert not body.keys() & {"temperature", "max_tokens"}
        assert (body["max_completion_tokens"], body["response_format"]["type"]) == (4000, "json_schema")
    assert judge.shards.folder != asked(server, tmp_path).shards.folder, "other fields may give other verdicts"


def test_a_refused_field_is_said_with_the_setting_that_leaves_it_out(serve, tmp_path):
    server = serve(honest)
    server.faults = [(400, {}, "Unsupported parameter: 'max_tokens'")] * 6
    with pytest.raises(
        FinalError, match=r"Unsupported parameter: 'max_tokens'.* judge\.server\.extra_body states other"
    ):
        asked(server, tmp_path).compare(ROWS)


@pytest.mark.parametrize(("fields", "said"), [
    ({"model": "m"}, "`model` is set by the judge itself"), ({"stream": True}, "`stream` is set by the judge itself"),
    ({"metadata": {"api_key": "sk-1"}}, r"`metadata\.api_key` may be a secret"),
    ({"since": datetime.date(2026, 1, 1)}, "It holds what JSON cannot"), ({"temperature": math.nan}, "It holds what JSON cannot"),
    ({"user": {"name": "\ud800"}}, "It holds what JSON cannot"),
])  # fmt: skip
def test_fields_that_the_judge_sets_or_that_may_be_secrets_are_refused(fields, said):
    with pytest.raises(ValidationError, match=said) as refused:
        JudgeServer(url="http://127.0.0.1:1/v1", model="judge", extra_body=fields)
    assert "sk-1" not in str(refused.value.errors(include_input=False))


@pytest.mark.parametrize("usage", [None, {}, {"total_tokens": 9}, {"prompt_tokens": 3, "completion_tokens": None}])
def test_a_verdict_counts_though_its_tokens_were_not_counted(usage):
    reply = {"choices": [{"message": {"content": "{}"}}], "usage": usage}
    assert ChatAnswer.model_validate(reply).usage is None
    for wrong in ({"prompt_tokens": -1, "completion_tokens": 1}, {"prompt_tokens": "1", "completion_tokens": 1}, 3):
        with pytest.raises(ValidationError):
            ChatAnswer.model_validate(reply | {"usage": wrong})


def test_nonsense_is_asked_for_again_by_the_next_run(serve, tmp_path, said):
    mixed = serve(lambda a, b: "Hm." if a.startswith("poor") else honest(a, b))
    assert verdicts(asked(mixed, tmp_path)) == [NO_VERDICT, NO_VERDICT, "tie"]
    assert any("The next run asks for them again." in message for message in said)
    mended = serve(honest)
    compared = asked(mended, tmp_path).compare(ROWS)
    assert outcomes(compared.margins).to_list() == ["win", "loss", "tie"]
    assert (compared.usage.reused, len(mended.bodies)) == (4, 2), "what was good is kept"
    assert verdicts(asked(SimpleNamespace(url="http://127.0.0.1:1/v1"), tmp_path)) == ["win", "loss", "tie"]


def test_nonsense_that_an_earlier_version_kept_is_asked_for_again(serve, tmp_path):
    judge = asked(serve(honest), tmp_path)
    judge.compare(ROWS)
    (shard,) = judge.shards.folder.glob("*.parquet")
    good = pl.read_parquet(shard.path)
    # The name decides which of two rows is read first.
    good.with_columns(reply=pl.lit("Hm.")).write_parquet(judge.shards.folder.path + "/0.parquet")
    assert verdicts(asked(SimpleNamespace(url="http://127.0.0.1:1/v1"), tmp_path)) == ["win", "loss", "tie"]
    shard.unlink()
    mended = serve(honest)
    assert verdicts(asked(mended, tmp_path)) == ["win", "loss", "tie"]
    assert len(mended.bodies) == 6


def test_one_order_without_a_verdict_is_none(serve, tmp_path):
    server = serve(lambda a, b: "Hm." if a.startswith("poor") else honest(a, b))
    assert verdicts(asked(server, tmp_path)) == [NO_VERDICT, NO_VERDICT, "tie"]


def test_what_passes_is_tried_again_and_as_many_as_stated_are_under_way(serve, tmp_path):
    server = serve(honest)
    server.faults, server.seconds = [(429, {"Retry-After": "1"}, "slowly"), (503, {}, "out of luck")], 0.05
    assert verdicts(asked(server, tmp_path, concurrency=2)) == ["win", "loss", "tie"]
    assert len(server.bodies) == 8
    assert server.busiest == 2
    assert max(server.times) - min(server.times) >= 1


def test_a_server_that_hangs_ends_the_step_with_the_settings_to_change(serve, tmp_path):
    server = serve(honest)
    server.seconds = 1.0
    with pytest.raises(RuntimeError, match=r"in 2 tries.*judge\.server\.attempts and judge\.server\.timeout_seconds"):
        asked(server, tmp_path, timeout_seconds=0.2, attempts=2).compare(ROWS[:1])


def test_a_server_that_is_down_for_long_ends_the_step_with_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("resources.common.progress.LOG_EVERY_SECONDS", 0)
    gone = SimpleNamespace(url="http://127.0.0.1:1/v1")
    with pytest.raises(RuntimeError, match=r"judge\.server\.attempts"):
        asked(gone, tmp_path, attempts=1).compare(ROWS[:1])


@pytest.mark.parametrize("status", [400, 401, 404])
def test_what_would_be_refused_again_ends_the_step_at_once(serve, tmp_path, status):
    server = serve(honest)
    server.faults = [(status, {}, "I will not do that")]
    with pytest.raises(FinalError, match=f"It says: {status}, I will not do that"):
        asked(server, tmp_path, concurrency=1).compare(ROWS[:1])


def test_finished_verdicts_are_read_again_even_while_the_server_is_down(serve, tmp_path):
    server = serve(honest)
    server.faults = [None] * 4 + [(401, {}, "enough")]
    with pytest.raises(FinalError):
        asked(server, tmp_path, shard_rows=2, concurrency=1).compare(ROWS)
    compared = asked(server, tmp_path, shard_rows=2, concurrency=1).compare(ROWS)
    assert (compared.usage.reused, compared.usage.readings) == (4, 6)
    gone = SimpleNamespace(url="http://127.0.0.1:1/v1")
    assert verdicts(asked(gone, tmp_path)) == ["win", "loss", "tie"]


def test_another_model_or_template_gives_other_shards(tmp_path):
    server = SimpleNamespace(url="http://127.0.0.1:1/v1")
    template = tmp_path / "mine.jinja"
    template.write_text("{{ prompt }} {{ answer_a }} {{ answer_b }}")
    folders = {
        asked(server, tmp_path).shards.folder.name,
        asked(server, tmp_path, template=str(template)).shards.folder.name,
        ServerJudge(JudgeServer(url=server.url, model="other"), str(tmp_path), 1).shards.folder.name,
    }
    assert len(folders) == 3
    elsewhere = SimpleNamespace(url="http://127.0.0.1:2/v1")
    assert asked(elsewhere, tmp_path, concurrency=1).shards.folder.name in folders


def test_the_shipped_template_shows_texts_as_they_are():
    template, _ = load_template(None)
    shown = template.render(prompt="a < b & {{ c }}", answer_a="<b>x</b>", answer_b="{% y %}")
    for text in ("a < b & {{ c }}", "<b>x</b>", "{% y %}"):
        assert text in shown


SHOWN = "{{ prompt }} {{ answer_a }} {{ answer_b }}"


@pytest.mark.parametrize(("text", "words"), [
    ("{{ prompt }} {{ answer_a }}", "uses answer_a, prompt: it must show answer_a, answer_b, prompt"),
    ("{{ prompt }} {{ answer_a }} {{ answer_b }} {{ gold }}", "uses answer_a, answer_b, gold, prompt"),
    ("{{ prompt", "cannot be used"), (None, "cannot be used"),
    (f"{SHOWN}{{{{ prompt.x.y }}}}", "cannot be used: UndefinedError: "),
    (f"{SHOWN}{{% include 'x' %}}", "cannot be used: TypeError: "),
    (f"{SHOWN}{{{{ 1 / 0 }}}}", "cannot be used: ZeroDivisionError: division by zero"),
    (f"{SHOWN}{{{{ prompt | shorten }}}}", "cannot be used: No filter named 'shorten'"),
    (f"{{% if false %}}{SHOWN}{{% endif %}}", "names prompt, answer_a, answer_b but does not show"),
    ("{{ prompt }} {{ answer_a }} {{ answer_b | wordcount }}", "names answer_b but does not show the text as it is."),
])  # fmt: skip
def test_a_template_that_cannot_be_used_is_refused_before_the_run(tmp_path, text, words):
    if text is not None:
        (tmp_path / "mine.jinja").write_text(text)
    judge = {"server": {"url": "http://127.0.0.1:1/v1", "model": "m", "template": "mine.jinja"}}
    stored = load_settings(write_settings(tmp_path / "mine.yaml", {"preset": "laptop", "judge": judge}))
    with pytest.raises(SettingsError, match=re.escape(words)):
        check_before_run(stored, tmp_path / "home")


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(("text", "words"), [
    (SHOWN + LOOP, "it does not end"), (f"{SHOWN}{{% if prompt|length > 20 %}}{LOOP}{{% endif %}}", "it does not end"),
    (SHOWN + "{{ 'x' * 3000000 }}", "it grows without end"), (f"{SHOWN}{{{{ prompt * 500 }}}}", "it grows without end"),
    (SHOWN + "{{ " + "(" * 20_000, "RecursionError: "), (SHOWN + "{{ range(10 ** 9) }}", "OverflowError: Range too big"),
    (SHOWN + "{% if prompt|length > 20 %}{{ 1 / 0 }}{% endif %}", "ZeroDivisionError: division by zero"),
    (None, "it is no file"),
], ids=["loop", "loop on long texts", "large", "large on long texts", "nested", "range", "error on long", "pipe"])  # fmt: skip
def test_a_template_of_a_judge_that_does_not_end_or_fails_is_refused(tmp_path, monkeypatch, text, words):
    monkeypatch.setattr("resources.models.bounded.CPU_SECONDS", 1)
    file = tmp_path / "mine.jinja"
    os.mkfifo(file) if text is None else file.write_text(text)
    with pytest.raises(
        SettingsError, match=rf"mine.jinja \(judge.server.template\) cannot be used: {words}.*\. (Correct|Name)"
    ):
        load_template(str(file))


@pytest.mark.parametrize(
    ("does", "words"), [(LOOP, "it does not end"), ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero")]
)
def test_a_template_of_a_judge_that_fails_on_one_prompt_alone_ends_in_a_sentence(tmp_path, monkeypatch, does, words):
    (tmp_path / "mine.jinja").write_text(f"{SHOWN}{{% if prompt == 'Why?' %}}{does}{{% endif %}}")
    judge = asked(SimpleNamespace(url="http://127.0.0.1:1/v1"), tmp_path, template=str(tmp_path / "mine.jinja"))
    monkeypatch.setattr("resources.models.bounded.CPU_SECONDS", 0.3)
    with pytest.raises(FinalError, match=rf"judge.server.template\) fails on the prompt 'Why\?': {words}\. Correct"):
        judge.compare([("Why?", "first", "second")])


def test_a_template_computes_nothing_beside_its_text(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(SHOWN + f"{{{{ cycler.__init__.__globals__.os.system('touch {tmp_path}/ran') }}}}")
    with pytest.raises(SettingsError, match="cannot be used: SecurityError"):
        load_template(str(file))
    assert not (tmp_path / "ran").exists()


def test_a_template_may_lay_texts_out(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(
        "{{ prompt | trim | upper }}{% for text in (answer_a, answer_b) %}{{ text | indent | tojson }}{% endfor %}"
    )
    template, _ = load_template(str(file))
    assert template.render(prompt=" a ", answer_a="b", answer_b="c") == 'A"b""c"'


def test_every_judge_says_whether_it_took_part_in_training(tmp_path):
    scorer = RewardScorer(
        shards=str(tmp_path), engine=active_settings().engine,
        scorer=PairRankerScorer(name="some/ranker", pair_convention="one_order", max_length=99),
    )  # fmt: skip
    judge = load_settings(preset_path("paper_mistral")).judge
    independent, took_part = open_judges(judge, scorer, CHECKPOINT, CHECKPOINT)
    assert (independent.name, independent.label) == ("judge", "independent judge")
    assert (took_part.name, took_part.label) == ("scorer", "scorer (took part in training)")
    assert independent.scorer.scorer.convention == "reward_difference", (
        "whatever the scorer is, the judge is a reward model"
    )
    assert took_part.scorer is scorer
    assert judge_scorer(judge, scorer).scorer.max_length == judge.max_length == 2048
    server = judge.model_copy(update={"server": JudgeServer(url="http://127.0.0.1:1/v1", model="m")})
    assert open_judges(server, scorer, CHECKPOINT, CHECKPOINT)[2].label == "m (on a server)"


class PrefersFirst:
    """Stands in for a pair ranker that always prefers what stands first."""

    answers_per_reading, conventions = PairRanker.answers_per_reading, PairRanker.conventions

    def __init__(self, weights, engine, max_length):
        pass

    def read(self, key, prompt, answers):
        return Reading(key, [0], [], False, [False, False])

    def score(self, readings):
        return [[1.0, 0.0] for _ in readings]


@pytest.mark.slow
@pytest.mark.parametrize("convention", PairRanker.conventions)
def test_a_preference_for_a_place_wins_nothing(instance, tmp_path, monkeypatch, convention):
    """Pairs are selected as the setting says; M_t, which always stands first, is judged in both orders."""
    monkeypatch.setitem(SCORERS, "pair_ranker", PrefersFirst)
    section = PairRankerScorer(name="some/ranker", pair_convention=convention)
    scorer = RewardScorer(shards=str(tmp_path / "scores"), engine=active_settings().engine, scorer=section)
    selected = scorer.compare(CHECKPOINT, [("Why?", "Because.", "So.")])
    assert (selected.convention, selected.margins[0]) == (convention, 1.0 if convention == "one_order" else 0.0)
    scorers = [stand_in("reward_model", "F"), stand_in("judge_model", "J")]
    _, services, _ = materialize([*scorers, evaluation], instance, tmp_path, monkeypatch, scorer=scorer)
    metrics = recorded(services.metrics, "0002")
    assert [rate.value for rate in metrics.every("win_rate")] == [0.5, 0.5, None, 0.5] * 2, (
        "of one sentence there is no half"
    )
    rewards = [metrics.value("held_out_reward", side) for side in ("candidate", "initial", "gold")]
    assert rewards[0] == rewards[1] == rewards[2]
    assert shown(instance, "evaluation", "0002")["score_convention"] == section.judging_convention


def test_the_evaluation_of_an_iteration_with_a_server_as_third_judge(serve, instance, tmp_path, monkeypatch):
    """The real asset; models stand in, whose answers tell which of them wrote."""
    server = serve(lambda a, b: better("A" if "M_2" in a else "B"))
    judge = active_settings().judge.model_copy(update={"server": JudgeServer(url=server.url, model="m")})
    scorers = [stand_in("reward_model", "F"), stand_in("judge_model", "J")]
    sections = {"judge": judge, "evaluation": active_settings().evaluation.model_copy(update={"samples": 2})}
    _, services, result = materialize([*scorers, evaluation], instance, tmp_path, monkeypatch, **sections)
    frame = result.output_for_node("evaluation")
    assert check(Evaluation, frame) is None
    held_out = SEED.filter(pl.col("split").is_in(HELD_OUT))
    twice = [row for row in held_out.select("prompt_id", "split").rows() for _ in range(2)]
    assert frame.select("prompt_id", "split").rows() == twice
    assert frame["sample"].to_list() == [1, 2] * 6
    sides = ("candidate", "previous", "initial", "trimmed", "verbose")
    assert frame.select(f"{side}_response" for side in sides).unique().rows() == [
        ("by M_2", "by M_1", "By M_0.", "", "By M_0.")
    ], "what was cut stands here without its unfinished end"
    assert frame["server_over_initial"].to_list() == ["win"] * 12
    metrics, about = recorded(services.metrics, "0002"), shown(instance, "evaluation", "0002")
    by_server = "m (on a server)"
    assert metrics.value("win_rate", "candidate", over="initial", by=INDEPENDENT) == 1.0
    assert metrics.value("win_rate", "candidate", over="previous", by=by_server) == 1.0
    assert metrics.value("wins", "candidate", over="previous", by=by_server) == 6
    assert metrics.value("wins", "candidate", over="previous", by=by_server, split="dev") == 6
    assert [(rate.by, rate.of, rate.over) for rate in metrics.every("win_rate")] == [
        (label, *comparison) for label in (INDEPENDENT, TOOK_PART, by_server) for comparison in COMPARISONS
    ]
    rates = {
        tuple(row.data[name] for name in ("label", "model", "opponent")): row.data for row in about["win_rates"].records
    }
    assert len(rates) == 3 * len(COMPARISONS)
    over_initial = metrics.find("win_rate", "candidate", over="initial", by=INDEPENDENT)
    ends = [rates[INDEPENDENT, "candidate", "initial"][end] for end in ("low", "high")]
    assert (over_initial.low, over_initial.high) == pytest.approx(ends, abs=1e-4), "shown with four digits"
    assert over_initial.n == 3
    assert {rate.checkpoint_sha for rate in metrics.every("win_rate")} == {*frame["candidate_checkpoint_sha"], None}
    models = ("candidate", "previous", "initial")
    assert [(each.of, each.value) for each in metrics.every("mean_characters")] == [
        (model, len(text)) for model, text in zip(models, ("by M_2", "by M_1", "By M_0."), strict=True)
    ], "as they are compared"
    assert [(each.of, each.value) for each in metrics.every("cut_share") if each.of] == list(
        zip(models, [0.0, 0.0, 1.0], strict=True)
    )
    # A third of what the three models wrote; M_0's verbose answers count neither among those cut nor among all.
    assert metrics.value("cut_share") == pytest.approx(1 / 3)
    assert metrics.value("mean_repetition", "candidate") == 0.0
    assert frame.select("candidate_cut", "initial_cut").rows() == [(False, True)] * 12
    both = metrics.find("win_rate_both_ended", "candidate", over="initial", by=INDEPENDENT)
    assert (both.value, both.n, both.low) == (None, 0, None)
    assert metrics.value("wins_both_ended", "candidate", over="initial", by=by_server) == 0
    assert metrics.value("wins_only_candidate_ended", "candidate", over="initial", by=by_server) == 6
    assert len(about["wins_by_ending"].records) == 3 * 4
    assert rates[by_server, "candidate", "previous"]["wins"] == 6
    assert about["judges"] == f"independent judge; scorer (took part in training); {by_server}"
