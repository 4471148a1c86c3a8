"""Metrics that tell good data from bad: how repetitive, how alike, how long."""

import itertools
import random
from collections.abc import Sequence

import polars as pl

from synpo_assets.method.cut import whole_answers
from synpo_assets.method.pairs import repetition
from synpo_assets.method.words import words_of

SAMPLED_TEXTS = 300
REPETITION_NGRAM = 3


def mean_repetition(texts: Sequence[str], size: int) -> float:
    """The mean share of word n-grams that a text repeats, over the texts.

    Examples:
        >>> mean_repetition(["tick tock tick tock tick tock", "no word comes twice here"], 2)
        0.3
    """
    return sum(repetition(text, size) for text in texts) / len(texts)


def answer_figures(answers: pl.DataFrame) -> dict[str, float]:
    """What can be said of a model's answers without asking any model: length, repetition, and how many were cut.

    The answers have columns text and finish_reason. Length is that of what is compared (see cut.py). Repetition is the share of
    repeated word 3-grams.

    Examples:
        >>> answers = pl.DataFrame({"text": ["so so so so", "fine"], "finish_reason": ["length", "stop"]})
        >>> answer_figures(answers)
        {'mean_characters': 2.0, 'mean_repetition': 0.25, 'cut_share': 0.5}
    """
    characters, was_cut = whole_answers(answers).str.len_chars(), answers["finish_reason"] == "length"
    return {
        "mean_characters": int(characters.sum()) / answers.height,
        "mean_repetition": mean_repetition(answers["text"].to_list(), REPETITION_NGRAM),
        "cut_share": int(was_cut.sum()) / answers.height,
    }


def length_ratio(texts: Sequence[str], others: Sequence[str]) -> float:
    """Characters of the texts over characters of the others.

    Examples:
        >>> length_ratio(["ab", "abcd"], ["abc"])
        2.0
    """
    return sum(map(len, texts)) / max(1, sum(map(len, others)))


def mean_word_overlap(texts: Sequence[str], random_seed: int) -> float:
    """The mean Jaccard similarity of the word sets of two texts, over all pairs of a random sample of the texts.

    A text counts the words it shares with another against all words of both: 0 if they share none, 1 if they share all.

    Examples:
        >>> mean_word_overlap(["red fox", "red hen", "blue sky"], random_seed=0)
        0.1111111111111111
    """
    sample = random.Random(random_seed).sample(list(texts), min(SAMPLED_TEXTS, len(texts)))
    pairs = list(itertools.combinations([set(words_of(text)) for text in sample], 2))
    return sum(len(a & b) / max(1, len(a | b)) for a, b in pairs) / max(1, len(pairs))
