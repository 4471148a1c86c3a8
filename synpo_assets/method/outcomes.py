"""What judges say of two answers: outcomes, the win rate, and how certain it is."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import polars as pl

NO_VERDICT = "no verdict"
POINTS = {"win": 1.0, "tie": 0.5, "loss": 0.0}
COVERAGE = 0.95
HALVINGS = 60  # More than a floating-point number has digits.


def outcomes(margins: pl.Series) -> pl.Series:
    """What each comparison came to, by the margin of the first answer; missing or not a number is no verdict.

    Examples:
        >>> outcomes(pl.Series([0.3, 0.0, -2.0, None])).to_list()
        ['win', 'tie', 'loss', 'no verdict']
    """
    margin = pl.col("margin")
    by_sign = pl.when(margin > 0).then(pl.lit("win")).when(margin < 0).then(pl.lit("loss")).otherwise(pl.lit("tie"))
    is_missing = margin.is_null() | margin.is_nan()
    frame = pl.DataFrame({"margin": margins.cast(pl.Float64)})
    return frame.select(outcome=pl.when(is_missing).then(pl.lit(NO_VERDICT)).otherwise(by_sign))["outcome"]


def win_rate(judged: pl.Series) -> float | None:
    """The share of prompts won, a tie counting half; None if there is no verdict at all.

    Examples:
        >>> win_rate(pl.Series(["win", "tie", "loss", "loss", "no verdict"]))
        0.375
    """
    points = points_of(judged)
    return float(points.mean()) if len(points) else None


def win_rate_interval(
    judged: pl.Series, prompts: pl.Series | None = None, coverage: float = COVERAGE
) -> tuple[float, float] | None:
    """The score interval of the win rate over prompts, 95 %; None if there is no verdict at all.

    It is Tango's interval for wins less losses (1998, Statistics in Medicine 17:891, a paired difference of proportions) as
    a rate: all rates that a score test does not reject, where the variance is the one that the rate itself makes likeliest.
    Without ties it is Wilson's interval, and ties narrow it. The percentile bootstrap is not used because it has no width
    where all outcomes are the same: 20 wins of 20 would be a rate of 1 for certain.

    Several answers to one prompt are not independent: with `prompts`, the prompt of each outcome, all counts are divided by the
    design effect (the variance of the mean when whole prompts are drawn, over that when outcomes are), which lies between 1
    and the number of answers to a prompt.

    Examples:
        >>> win_rate_interval(pl.Series(["win"] * 20))
        (0.8388748419471808, 1.0)
        >>> [round(end, 3) for end in win_rate_interval(pl.Series(["win"] * 30 + ["tie"] * 10 + ["loss"] * 24))]
        [0.435, 0.654]
    """
    counts = [int((judged == outcome).sum()) for outcome in POINTS]
    if not sum(counts):
        return None
    effect = 1.0 if prompts is None else _design_effect(points_of(judged), prompts.filter(judged != NO_VERDICT))
    wins, ties, losses = (count / effect for count in counts)
    quantile = NormalDist().inv_cdf((1 + coverage) / 2)
    # Exchanging the sides exchanges the ends.
    return 1 - _highest_rate(losses, ties, wins, quantile), _highest_rate(wins, ties, losses, quantile)


def share_interval(holds: Sequence[bool]) -> tuple[float, float] | None:
    """Wilson's 95 % interval of a share over prompts; None if there are none.

    Examples:
        >>> [round(end, 3) for end in share_interval([True] * 9 + [False])]
        [0.596, 0.982]
    """
    return win_rate_interval(pl.Series(["win" if each else "loss" for each in holds], dtype=pl.String))


def _design_effect(points: np.ndarray, prompts: pl.Series) -> float:
    """How much less several outcomes of the same prompts say than as many of different ones."""
    centred = pl.DataFrame({"prompt": prompts, "points": points - points.mean()})
    by_prompt = centred.group_by("prompt").agg(pl.col("points").sum())["points"].to_numpy()
    largest, spread = len(points) / len(by_prompt), (centred["points"] ** 2).sum()
    # Without any spread the worst is assumed.
    return float(np.clip((by_prompt**2).sum() / spread, 1, largest)) if spread > 0 else largest


def _highest_rate(wins: float, ties: float, losses: float, quantile: float) -> float:
    """The highest win rate that the score test does not reject, found by halving."""
    prompts = wins + ties + losses
    low, high = (wins + ties / 2) / prompts, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        difference = 2 * middle - 1
        # The likeliest share of losses, given that of wins less that of losses: Tango's quadratic equation.
        linear = (2 * prompts - wins + losses) * difference - wins - losses
        root = max(linear**2 + 8 * prompts * losses * difference * (1 - difference), 0)
        variance = 2 * (math.sqrt(root) - linear) / (4 * prompts) + difference * (1 - difference)
        if prompts * difference - (wins - losses) > quantile * math.sqrt(max(prompts * variance, 0)):
            high = middle
        else:
            low = middle
    return high


def points_of(judged: pl.Series) -> np.ndarray:
    """1 for a win, 0.5 for a tie, 0 for a loss; outcomes without a verdict are left out."""
    return judged.filter(judged != NO_VERDICT).replace_strict(POINTS, return_dtype=pl.Float64).to_numpy()
