"""Answers that were cut: one treatment wherever answers are compared."""

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synpo_assets.method.cut import first_half, whole_answers, whole_sentences
from synpo_assets.method.pairs import join_sides, select_pairs
from synpo_assets.method.ranking import repeated_prompts, with_ranks
from tests.stand_ins import scored
from tests.test_method import responses

SENTENCES = st.lists(
    st.sampled_from(
        ["Tea is hot.", "Why so?", "He said “no!”", "It costs 3.50 here.", "水は冷たい。", "Wait…", "- milk\n"]
    ),
    max_size=6,
)
# What a sentence begins with; none of it ends one.
UNFINISHED = st.sampled_from(["", "And the", "It costs 3.", "\n2.", "\n  b)", "Note:\n", "so,\n"]).filter(
    lambda text: not text.endswith("3.")
)


@pytest.mark.parametrize(("text", "whole"), [
    ("Tea is hot. It is made of lea", "Tea is hot."), ("No end in si", ""), ("", ""), ("Was? Ja! So e", "Was? Ja!"),
    ('He said "yes." Then', 'He said "yes."'), ("**Bold.** more te", "**Bold.**"), ("It costs 3.5 dol", ""),
    ("You need:\n1. Tea\n2.", "You need:\n1. Tea"), ("You need:\n1.", ""), ("a:\n- d\n- e\n- ", "a:\n- d\n- e"),
    ("मैं घर जाता हूँ। वह", "मैं घर जाता हूँ।"), ("أين أنت؟ أنا", "أين أنت؟"), ("یہ ہے\u06d4 وہ", "یہ ہے\u06d4"),
    ("中文。更多", "中文。"), ("x = 5\ny = ", "x = 5"), ("   2. Boil.\n   3. Po", "   2. Boil."),
])  # fmt: skip
def test_golden_texts(text, whole):
    assert whole_sentences(text) == whole


@given(SENTENCES, UNFINISHED)
def test_what_is_whole_stays_and_what_is_not_goes(sentences, rest):
    text = " ".join(sentences)
    assert whole_sentences(f"{text} {rest}").strip() == text.strip()


@given(st.text(alphabet='a b.1)\n?:-"', max_size=40))
def test_trimming_only_takes_from_the_end_and_trims_nothing_twice(text):
    whole = whole_sentences(text)
    assert text.startswith(whole)
    assert whole_sentences(f"{whole}\n").strip() == whole.strip()
    assert text.startswith(first_half(text))


def test_only_what_was_cut_is_trimmed():
    completions = pl.DataFrame({"text": [" Yes. An", "Yes. An ", "No"], "finish_reason": ["length", "stop", "length"]})
    assert whole_answers(completions).to_list() == ["Yes.", "Yes. An", ""]


def test_a_cut_answer_cannot_be_told_from_an_ended_one_with_the_same_words():
    """The table, and all that reads it, sees the same text; only the finish reason says what happened."""
    cut, ended = responses("r", ["Tea is hot. It is"], ending="length"), responses("r", ["Tea is hot."])
    assert cut["response"].to_list() == ended["response"].to_list()
    assert cut["response_id"].to_list() == ended["response_id"].to_list()
    assert (cut["finish_reason"][0], ended["finish_reason"][0]) == ("length", "stop")


def test_pairs_with_a_cut_side_are_dropped_and_counted():
    chosen = pl.concat([responses("r", ["Good."] * 3), responses("r", ["Good. Y"], ending="length", first=3)])
    rejected = pl.concat([responses("0", ["Bad. X"], ending="length"), responses("0", ["Bad."] * 3, first=1)])
    kept, dropped = select_pairs(scored(join_sides(chosen, rejected), 1.0, 0.0), 0, 1, 3, 9, 0)
    assert kept["prompt_id"].to_list() == ["prompt-1", "prompt-2"]
    assert dropped == {"cut": 2, "empty_side": 0, "equal_sides": 0, "repetition": 0, "margin": 0, "not_sampled": 0}


@given(st.lists(st.tuples(st.integers(-3, 3).map(float), st.booleans()), min_size=2, max_size=6))
def test_cut_samples_take_no_rank(samples):
    """Best and worst are the extremes of those that ended; where less than two did, a cut one shows, and the pair is dropped."""
    margins = [0.0, *(margin for margin, _ in samples[1:])]
    ended = [margin for margin, (_, is_cut) in zip(margins, samples, strict=True) if not is_cut]
    repeated = repeated_prompts(pl.DataFrame({"prompt_id": ["prompt-1"]}), len(samples)).with_columns(
        finish_reason=pl.Series(["length" if is_cut else "stop" for _, is_cut in samples])
    )
    ranked = with_ranks(repeated, pl.Series(margins[1:]))
    best, worst = (ranked.filter(pl.col("rank") == rank).row(0, named=True) for rank in (pl.lit(1), pl.col("worst")))
    assert best["sample"] != worst["sample"]
    reasons = {best["finish_reason"], worst["finish_reason"]}
    assert (reasons == {"stop"}) == (len(ended) >= 2)
    if len(ended) >= 2:
        assert (best["margin_over_first"], worst["margin_over_first"]) == (max(ended), min(ended))
