"""Comparing two models on the same prompts: win rates, how certain they are, and what length has to do with them."""

import math
from collections.abc import Mapping, Sequence

import polars as pl

from synpo_assets.method.length_control import (
    alike_in_length,
    is_extrapolated,
    length_controlled_interval,
    length_controlled_win_rate,
)
from synpo_assets.method.outcomes import COVERAGE, NO_VERDICT, POINTS, points_of, win_rate, win_rate_interval

# Whether M_t's and M_0's answers were cut.
ENDINGS = {
    "both_ended": (False, False),
    "only_candidate_ended": (False, True),
    "only_initial_ended": (True, False),
    "neither_ended": (True, True),
}
# Fewer say too little of how much they differ.
FEWEST_GROUPS = 6
# An answer's length over gold's: below the first number, between the two, above the second.
LENGTH_BOUNDS = (0.5, 2.0)
LENGTH_BANDS = ("less than half of gold's length", "half to twice gold's length", "more than twice gold's length")


def mean_gain(
    gains: pl.Series, groups: pl.Series | None = None, most: float = math.inf
) -> tuple[float | None, float | None, float | None]:
    """The mean of what the candidate has more than M_0, and the ends of its 95 % interval; None without any.

    The interval is by Student's t, with a standard error over groups (Cameron and Miller 2015,
    https://doi.org/10.3368/jhr.50.2.317): a bootstrap over ten groups holds the true gain in 87 % of the cases, not 95 %.
    Gains that are all the same, over groups if there are some, and those of fewer than six groups have no interval.

    Args:
        gains: One for each prompt.
        groups: What each prompt belongs to, such as the template that it was made of; None: prompts are independent.
        most: What no gain can exceed, up or down.

    Examples:
        >>> mean_gain(pl.Series([0.5] * 6))
        (0.5, None, None)
        >>> [round(each, 3) for each in mean_gain(pl.Series([0.0, 0.2] * 4))]
        [0.1, 0.011, 0.189]
        >>> [round(each, 3) for each in mean_gain(pl.Series([0.0, 0.2] * 4), pl.Series([0, 0, 0, 1, 2, 3, 4, 5]))]
        [0.1, 0.014, 0.186]
    """
    from scipy.special import stdtrit

    if gains.is_empty():
        return None, None, None
    mean = float(gains.to_numpy().mean())
    groups = pl.Series(range(len(gains))) if groups is None else groups
    left = pl.DataFrame({"group": groups, "left": gains - mean}).group_by("group").agg(pl.col("left").sum())["left"]
    # Rounded, because values that differ in the last digit only are one value.
    error = round(math.sqrt((left**2).sum() * len(left) / max(1, len(left) - 1)) / len(gains), 12)
    if len(left) < FEWEST_GROUPS or error == 0:
        return mean, None, None
    reach = stdtrit(len(left) - 1, (1 + COVERAGE) / 2) * error
    return mean, max(-most, float(mean - reach)), min(most, float(mean + reach))


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

    Where hardly any answers are alike in length, there is no length-controlled rate.
    The frame has a row per answer, with prompt_id, the answers (`candidate_response`) and the outcomes (`outcome_name`).
    `judges` gives each its label, and a comparison names the model and the one that it is compared with.
    """
    rows = []
    for judge, label in judges.items():
        for model, opponent in comparisons:
            judged, prompts = frame[outcome_name(judge, model, opponent)], frame["prompt_id"]
            lengths, others = (frame[f"{name}_response"].str.len_chars().cast(pl.Int64) for name in (model, opponent))
            low, high = length_controlled_interval(judged, lengths, others, random_seed, prompts) or (None, None)
            counted, alike = _counted(judged, prompts), alike_in_length(judged, lengths, others, prompts)
            extrapolated = is_extrapolated(alike, counted["prompts"] or 0)
            rows.append(
                {
                    "judge": judge,
                    "label": label,
                    "model": model,
                    "opponent": opponent,
                    **counted,
                    "no_verdict": int((judged == NO_VERDICT).sum()),
                    # Read off a fitted curve and hardly seen, it says nothing.
                    "length_controlled": None if extrapolated else length_controlled_win_rate(judged, lengths, others),
                    "length_controlled_low": None if extrapolated else low,
                    "length_controlled_high": None if extrapolated else high,
                    "alike_in_length": alike,
                }
            )
    numbers = dict.fromkeys(
        ("win_rate", "low", "high", "length_controlled", "length_controlled_low", "length_controlled_high"), pl.Float64
    )
    return pl.DataFrame(rows, schema_overrides=numbers)


def points_over_null(frame: pl.DataFrame, judge: str, null: str) -> pl.DataFrame:
    """What the candidate has more than a null, both over M_0, wherever a judge says something of both: prompt_id and gain.

    The frame is as that of `win_rates`.
    """
    ours, theirs = (outcome_name(judge, model, "initial") for model in ("candidate", null))
    judged = frame.filter((pl.col(ours) != NO_VERDICT) & (pl.col(theirs) != NO_VERDICT))
    return judged.select("prompt_id", gain=points_of(judged[ours]) - points_of(judged[theirs]))


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
