"""Comparing two models on the same prompts: win rates, how certain they are, and what length has to do with them."""

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from synpo_assets.method.length_control import alike_in_length, length_controlled_interval, length_controlled_win_rate
from synpo_assets.method.outcomes import COVERAGE, NO_VERDICT, POINTS, win_rate, win_rate_interval

# Whether M_t's and M_0's answers were cut.
ENDINGS = {
    "both_ended": (False, False),
    "only_candidate_ended": (False, True),
    "only_initial_ended": (True, False),
    "neither_ended": (True, True),
}
RESAMPLES = 10_000
# An answer's length over gold's: below the first number, between the two, above the second.
LENGTH_BOUNDS = (0.5, 2.0)
LENGTH_BANDS = ("less than half of gold's length", "half to twice gold's length", "more than twice gold's length")


def bootstrap_mean(values: np.ndarray, random_seed: int) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of one number per prompt, 95 %.

    To draw n values with replacement is to draw their counts from a multinomial distribution, so no value is looked at twice,
    however many there are.
    """
    different, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(random_seed).multinomial(len(values), counts / len(values), size=RESAMPLES)
    return _ends(drawn @ different / len(values))


def _ends(means: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)


def mean_gain(
    gains: pl.Series, random_seed: int, groups: pl.Series | None = None
) -> tuple[float | None, float | None, float | None]:
    """The mean of what the candidate has more than M_0, and the ends of its 95 % bootstrap interval; None without any.

    Gains that are all the same, over groups if there are some, have no interval: to draw among them shows nothing of what other
    prompts would gain.

    Args:
        gains: One for each prompt.
        random_seed: Draws.
        groups: What each prompt belongs to, such as the template that it was made of; None: prompts are independent.

    Examples:
        >>> mean_gain(pl.Series([0.5, 0.5]), random_seed=0)
        (0.5, None, None)
        >>> mean_gain(pl.Series([1.0, 1.0, 0.0, 0.0]), 0, pl.Series(["a", "a", "b", "b"]))
        (0.5, 0.0, 1.0)
    """
    if gains.is_empty():
        return None, None, None
    # Rounded, because values that differ in the last digit only are one value.
    values = gains.round(9)
    groups = pl.Series(range(len(values))) if groups is None else groups
    drawn = (
        pl.DataFrame({"group": groups, "value": values})
        .group_by("group")
        .agg(pl.col("value").sum(), pl.len())
        .sort("group")
    )
    mean = float(values.to_numpy().mean())
    if (drawn["value"] / drawn["len"]).round(9).n_unique() == 1:
        return mean, None, None
    if drawn.height == len(values):
        return mean, *bootstrap_mean(values.to_numpy(), random_seed)
    counts = np.random.default_rng(random_seed).multinomial(
        drawn.height, np.full(drawn.height, 1 / drawn.height), size=RESAMPLES
    )
    low, high = _ends((counts @ drawn["value"].to_numpy()) / (counts @ drawn["len"].to_numpy()))
    return mean, low, high


def length_bands(ratios: pl.Series) -> pl.Series:
    """The band that each answer's length lies in, by its ratio to gold's; both bounds belong to the middle one.

    Examples:
        >>> length_bands(pl.Series([0.49, 0.5, 2.0])).to_list()
        ["less than half of gold's length", "half to twice gold's length", "half to twice gold's length"]
    """
    ratio, (least, most), (shorter, alike, longer) = pl.col("ratio"), LENGTH_BOUNDS, LENGTH_BANDS
    band = pl.when(ratio < least).then(pl.lit(shorter)).when(ratio > most).then(pl.lit(longer)).otherwise(pl.lit(alike))
    return pl.DataFrame({"ratio": ratios.cast(pl.Float64)}).select(band=band)["band"]


def win_rates(
    frame: pl.DataFrame, judges: Mapping[str, str], comparisons: Sequence[tuple[str, str]], random_seed: int
) -> pl.DataFrame:
    """What each judge makes of each comparison: one row per judge and comparison.

    The frame has a row per answer, with prompt_id, the answers (`candidate_response`) and the outcomes (`outcome_name`).
    `judges` gives each its label, and a comparison names the model and the one that it is compared with.
    """
    rows = []
    for judge, label in judges.items():
        for model, opponent in comparisons:
            judged, prompts = frame[outcome_name(judge, model, opponent)], frame["prompt_id"]
            lengths, others = (frame[f"{name}_response"].str.len_chars().cast(pl.Int64) for name in (model, opponent))
            low, high = length_controlled_interval(judged, lengths, others, random_seed, prompts) or (None, None)
            rows.append(
                {
                    "judge": judge,
                    "label": label,
                    "model": model,
                    "opponent": opponent,
                    **_counted(judged, prompts),
                    "no_verdict": int((judged == NO_VERDICT).sum()),
                    "length_controlled": length_controlled_win_rate(judged, lengths, others),
                    "length_controlled_low": low,
                    "length_controlled_high": high,
                    "alike_in_length": alike_in_length(judged, lengths, others, prompts),
                }
            )
    numbers = dict.fromkeys(
        ("win_rate", "low", "high", "length_controlled", "length_controlled_low", "length_controlled_high"), pl.Float64
    )
    return pl.DataFrame(rows, schema_overrides=numbers)


def outcome_name(judge: str, model: str, opponent: str) -> str:
    """The column that says what a judge makes of a model's answers beside an opponent's.

    Examples:
        >>> outcome_name("judge", "candidate", "initial"), outcome_name("judge", "verbose", "initial")
        ('judge_over_initial', 'judge_verbose_over_initial')
    """
    return f"{judge}_over_{opponent}" if model == "candidate" else f"{judge}_{model}_over_{opponent}"


def wins_by_ending(frame: pl.DataFrame, judges: Mapping[str, str]) -> pl.DataFrame:
    """What each judge makes of M_t beside M_0 by which answers ended by themselves: a row per judge and case.

    The frame has the outcomes (`judge_over_initial`) and whether each answer was cut. Where both ended, a judge cannot go
    by the cut; what M_t wins there is closer to what its content wins.
    """
    rows = []
    for judge, label in judges.items():
        for ended, (candidate_cut, initial_cut) in ENDINGS.items():
            found = frame.filter(candidate_cut=candidate_cut, initial_cut=initial_cut)
            counted = _counted(found[outcome_name(judge, "candidate", "initial")], found["prompt_id"])
            rows.append({"judge": judge, "label": label, "ended": ended, **counted})
    return pl.DataFrame(rows, schema_overrides=dict.fromkeys(("win_rate", "low", "high"), pl.Float64))


def _counted(judged: pl.Series, prompts: pl.Series) -> dict[str, float | None]:
    """Outcomes by kind, prompts with a verdict, and the win rate with its interval."""
    wins, ties, losses = (int((judged == outcome).sum()) for outcome in POINTS)
    low, high = win_rate_interval(judged, prompts) or (None, None)
    of_prompts = prompts.filter(judged != NO_VERDICT).n_unique()
    counts = {"wins": wins, "ties": ties, "losses": losses, "prompts": of_prompts}
    return {**counts, "win_rate": win_rate(judged), "low": low, "high": high}
