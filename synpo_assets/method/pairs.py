"""Preference pairs: joining the two sides, filtering, sampling (paper, section 2.3 and algorithm 1, line 4)."""

import collections
from typing import Any

import polars as pl

from synpo_assets.method.ids import content_id
from synpo_assets.method.rules import rules_text
from synpo_assets.method.verifiable import BY_RULES
from synpo_assets.method.words import words_of


def repetition(text: str, size: int) -> float:
    """The share of a text's word n-grams that already occurred earlier in it, from 0 to 1.

    The paper drops data with more than half repetition and leaves the measure open; this is ours.

    Examples:
        >>> repetition("tick tock tick tock tick tock", 2)
        0.6
        >>> repetition("no word comes twice here", 2)
        0.0
    """
    words = words_of(text)
    runs = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def middle_pair(pairs: pl.DataFrame) -> dict[str, Any]:
    """The pair with the median margin; of an even number the one above.

    Examples:
        >>> middle_pair(pl.DataFrame({"pair_id": ["a", "b", "c", "d"], "margin": [0.5, 2.0, 1.0, 1.0]}))
        {'pair_id': 'd', 'margin': 1.0}
    """
    return pairs.sort("margin", "pair_id").row(pairs.height // 2, named=True)


def join_sides(chosen: pl.DataFrame, rejected: pl.DataFrame) -> pl.DataFrame:
    """The answers to each prompt that has both sides, side by side in columns chosen_* and rejected_*, with an id of the two."""
    columns = ["response_id", "response", "finish_reason", "checkpoint_sha"]
    sides = {name: [pl.col(column).alias(f"{name}_{column}") for column in columns] for name in ("chosen", "rejected")}
    # A join shares the texts with frames of one chunk; from frames of several it copies them.
    left = chosen.select("prompt_id", "prompt", *sides["chosen"]).rechunk()
    right = rejected.select("prompt_id", *sides["rejected"]).rechunk()
    joined = left.join(right, on="prompt_id", validate="1:1", maintain_order="left")
    ids = joined.select("chosen_response_id", "rejected_response_id").iter_rows()
    return joined.with_columns(pair_id=pl.Series((content_id("pair", *both) for both in ids), dtype=pl.String))


def length_factor(text: pl.Expr, other: pl.Expr) -> pl.Expr:
    """How many times as many characters the longer of two texts has, at least 1; an empty text counts as one character.

    Examples:
        >>> sides = pl.DataFrame({"one": ["ab", "abcd"], "other": ["abcd", ""]})
        >>> sides.select(ratio=length_factor(pl.col("one"), pl.col("other")))["ratio"].to_list()
        [2.0, 4.0]
    """
    lengths = [each.str.len_chars().clip(1).cast(pl.Float64) for each in (text, other)]
    return pl.max_horizontal(lengths) / pl.min_horizontal(lengths)


def select_pairs(
    scored: pl.DataFrame,
    margin_threshold: float,
    max_repetition: float,
    ngram: int,
    count: int,
    random_seed: int,
    max_length_ratio: float | None = None,
) -> tuple[pl.DataFrame, dict[str, int]]:
    """Keeps the valid pairs and a random sample of them, in order, with margin; and counts what each filter dropped.

    A pair is valid if neither side was cut, chosen_score - rejected_score exceeds the threshold, its chosen side repeats no
    larger share of its word n-grams than `max_repetition`, and neither side has more than `max_length_ratio` times the
    characters of the other. Where its prompt has rules, no threshold is read: chosen must follow all, and rejected must not.
    """
    sides = [pl.col("chosen_response").str.strip_chars(), pl.col("rejected_response").str.strip_chars()]
    repeats = pl.col("chosen_response").map_elements(lambda text: repetition(text, ngram), return_dtype=pl.Float64)
    rules = {
        "cut": (pl.col("chosen_finish_reason") == "stop") & (pl.col("rejected_finish_reason") == "stop"),
        "empty_side": (sides[0] != "") & (sides[1] != ""),
        "equal_sides": sides[0] != sides[1],
        "repetition": repeats <= max_repetition,
        "margin": BY_RULES | (pl.col("margin") > margin_threshold),
    }
    if scored.select(BY_RULES.any()).item():
        rules["rules"] = ~BY_RULES | (pl.col("margin") > 0)
    if max_length_ratio is not None:
        rules["length"] = length_factor(*sides) <= max_length_ratio
    scored = scored.with_columns(margin=pl.col("chosen_score") - pl.col("rejected_score"))
    columns = [f"{side}_{column}" for side in ("chosen", "rejected") for column in ("response", "finish_reason")]
    rows = scored.select(*columns, "margin", "score_convention").with_row_index("place")
    dropped: collections.Counter[str] = collections.Counter()
    for reason, rule in rules.items():
        # Streamed, because a rule that strips the texts copies them.
        kept = rows.lazy().filter(rule).collect(engine="streaming")
        dropped[reason] = rows.height - kept.height
        rows = kept
    sampled = rows["place"].sample(min(count, rows.height), seed=random_seed, shuffle=True).sort()
    dropped["not_sampled"] = rows.height - sampled.len()
    return scored[sampled], dict(dropped)


def as_preferences(pairs: pl.DataFrame) -> pl.DataFrame:
    """Turns selected pairs into TRL's conversational preference format; other columns stay as they are."""
    rules = (rules_text(constraints) for constraints in pairs["constraints"].to_list())
    return pairs.with_columns(
        prompt=_message("user", "prompt"),
        chosen=_message("assistant", "chosen_response"),
        rejected=_message("assistant", "rejected_response"),
        rules=pl.Series(rules, dtype=pl.String),
    ).drop("chosen_response", "rejected_response", "constraints")


MESSAGES = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))


def _message(role: str, column: str) -> pl.Expr:
    """A conversation of one message, whose text stands in a column."""
    return pl.concat_list(pl.struct(role=pl.lit(role), content=column)).cast(MESSAGES)
