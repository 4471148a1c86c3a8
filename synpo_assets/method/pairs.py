"""Preference pairs: joining the two sides, filtering, sampling (paper, section 2.3 and algorithm 1, line 4)."""

import collections

import polars as pl

from synpo_assets.method.ids import content_id
from synpo_assets.method.prompts import words_of
from synpo_assets.method.templates import user_message


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


def join_sides(chosen: pl.DataFrame, rejected: pl.DataFrame) -> pl.DataFrame:
    """Puts the refined answer and the rejected answer of each prompt side by side.

    Args:
        chosen: Responses with response_id, prompt_id, prompt, response, finish_reason, checkpoint_sha.
        rejected: The same columns.

    Returns:
        One row per prompt that has both sides, with chosen_* and rejected_* columns.
    """
    columns = ["response_id", "response", "finish_reason", "checkpoint_sha"]
    sides = {
        name: frame.select("prompt_id", *(pl.col(column).alias(f"{name}_{column}") for column in columns))
        for name, frame in (("chosen", chosen), ("rejected", rejected))
    }
    prompts = chosen.select("prompt_id", "prompt")
    joined = prompts.join(sides["chosen"], on="prompt_id", validate="1:1", maintain_order="left")
    return joined.join(sides["rejected"], on="prompt_id", validate="1:1", maintain_order="left")


def select_pairs(
    scored: pl.DataFrame, margin_threshold: float, max_repetition: float, ngram: int, count: int, random_seed: int
) -> tuple[pl.DataFrame, dict[str, int]]:
    """Keeps the valid pairs and a random sample of them.

    Args:
        scored: Output of `join_sides` plus chosen_score and rejected_score.
        margin_threshold: Kept if chosen_score - rejected_score exceeds this.
        max_repetition: Dropped if the chosen side repeats itself more than this.
        ngram: Size of the word runs that count as repetition.
        count: Pairs wanted; all survivors are kept if there are fewer.
        random_seed: Fixes the sample.

    Returns:
        The pairs in the order of `scored`, with margin; and how many rows each rule dropped, in the order applied.
    """
    sides = [pl.col("chosen_response").str.strip_chars(), pl.col("rejected_response").str.strip_chars()]
    repeats = pl.col("chosen_response").map_elements(lambda text: repetition(text, ngram), return_dtype=pl.Float64)
    rules = {
        "empty_side": (sides[0] != "") & (sides[1] != ""),
        "equal_sides": sides[0] != sides[1],
        "repetition": repeats <= max_repetition,
        "margin": pl.col("margin") > margin_threshold,
    }
    rows = scored.with_columns(margin=pl.col("chosen_score") - pl.col("rejected_score"))
    dropped: collections.Counter[str] = collections.Counter()
    for reason, rule in rules.items():
        kept = rows.filter(rule)
        dropped[reason] = rows.height - kept.height
        rows = kept
    sampled = rows.with_row_index("place").sample(min(count, rows.height), seed=random_seed, shuffle=True)
    dropped["not_sampled"] = rows.height - sampled.height
    return sampled.sort("place").drop("place"), dict(dropped)


def as_preferences(pairs: pl.DataFrame) -> pl.DataFrame:
    """Turns selected pairs into TRL's conversational preference format, with ids.

    Returns:
        prompt, chosen and rejected as lists of messages, pair_id, and the other columns unchanged.
    """
    rows = pairs.to_dicts()
    return pairs.with_columns(
        pair_id=pl.Series(
            [content_id("pair", r["chosen_response_id"], r["rejected_response_id"]) for r in rows], dtype=pl.String
        ),
        prompt=pl.Series([user_message(row["prompt"]) for row in rows], dtype=MESSAGES),
        chosen=pl.Series([_assistant(row["chosen_response"]) for row in rows], dtype=MESSAGES),
        rejected=pl.Series([_assistant(row["rejected_response"]) for row in rows], dtype=MESSAGES),
    ).drop("chosen_response", "rejected_response")


MESSAGES = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
