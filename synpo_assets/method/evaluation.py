"""Comparing two models on the same prompts: win rates, how certain they are, and what length has to do with them."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import polars as pl

NO_VERDICT = "no verdict"
POINTS = {"win": 1.0, "tie": 0.5, "loss": 0.0}
# Whether M_t's and M_0's answers were cut.
ENDINGS = {
    "both_ended": (False, False),
    "only_candidate_ended": (False, True),
    "only_initial_ended": (True, False),
    "neither_ended": (True, True),
}
RESAMPLES = 10_000
COVERAGE = 0.95
QUANTILE = NormalDist().inv_cdf((1 + COVERAGE) / 2)
HALVINGS = 60  # More than a floating-point number has digits.
CONTROLLED_RESAMPLES = 1000
TABLE_VALUES = 100_000
MOST_STEPS = 100
# An answer's length over gold's: below the first number, between the two, above the second.
LENGTH_BOUNDS = (0.5, 2.0)
LENGTH_BANDS = ("less than half of gold's length", "half to twice gold's length", "more than twice gold's length")


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
    points = _points(judged)
    return float(points.mean()) if len(points) else None


def win_rate_interval(judged: pl.Series) -> tuple[float, float] | None:
    """The 95 % score interval of the win rate over prompts; None if there is no verdict at all.

    It is Tango's interval for wins less losses (1998, Statistics in Medicine 17:891, a paired difference of proportions) as
    a rate: all rates that a score test does not reject, where the variance is the one that the rate itself makes likeliest.
    Without ties it is Wilson's interval, and ties narrow it. The percentile bootstrap is not used because it has no width
    where all outcomes are the same: 20 wins of 20 would be a rate of 1 for certain.

    One outcome for each prompt: several answers to a prompt are not independent and would have to be made one outcome first.

    Examples:
        >>> win_rate_interval(pl.Series(["win"] * 20))
        (0.8388748419471808, 1.0)
        >>> [round(end, 3) for end in win_rate_interval(pl.Series(["win"] * 30 + ["tie"] * 10 + ["loss"] * 24))]
        [0.435, 0.654]
    """
    wins, ties, losses = (int((judged == outcome).sum()) for outcome in POINTS)
    if not wins + ties + losses:
        return None
    # Exchanging the sides exchanges the ends.
    return 1 - _highest_rate(losses, ties, wins), _highest_rate(wins, ties, losses)


def share_interval(holds: Sequence[bool]) -> tuple[float, float] | None:
    """Wilson's 95 % interval of a share over prompts; None if there are none.

    Examples:
        >>> [round(end, 3) for end in share_interval([True] * 9 + [False])]
        [0.596, 0.982]
    """
    return win_rate_interval(pl.Series(["win" if each else "loss" for each in holds], dtype=pl.String))


def bootstrap_mean(values: np.ndarray, random_seed: int) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of one number per prompt, 95 %.

    To draw n values with replacement is to draw their counts from a multinomial distribution, so no value is looked at twice,
    however many there are.
    """
    different, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(random_seed).multinomial(len(values), counts / len(values), size=RESAMPLES)
    low, high = np.quantile(drawn @ different / len(values), [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)


def mean_gain(gains: pl.Series, random_seed: int) -> tuple[float | None, float | None, float | None]:
    """The mean of what the candidate has more than M_0, and the ends of its 95 % bootstrap interval; None without any.

    Examples:
        >>> mean_gain(pl.Series([0.5, 0.5]), random_seed=0)
        (0.5, 0.5, 0.5)
    """
    if gains.is_empty():
        return None, None, None
    # Rounded, because values that differ in the last digit only are one value.
    values = gains.round(9).to_numpy()
    return float(values.mean()), *bootstrap_mean(values, random_seed)


def length_bands(ratios: pl.Series) -> pl.Series:
    """The band that each answer's length lies in, by its ratio to gold's; both bounds belong to the middle one.

    Examples:
        >>> length_bands(pl.Series([0.49, 0.5, 2.0])).to_list()
        ["less than half of gold's length", "half to twice gold's length", "half to twice gold's length"]
    """
    ratio, (least, most), (shorter, alike, longer) = pl.col("ratio"), LENGTH_BOUNDS, LENGTH_BANDS
    band = pl.when(ratio < least).then(pl.lit(shorter)).when(ratio > most).then(pl.lit(longer)).otherwise(pl.lit(alike))
    return pl.DataFrame({"ratio": ratios.cast(pl.Float64)}).select(band=band)["band"]


def length_controlled_win_rate(judged: pl.Series, lengths: pl.Series, other_lengths: pl.Series) -> float | None:
    """The win rate that answers of equal length would have, as AlpacaEval 2 estimates it (arXiv 2404.04475).

    A logistic regression, logit(win) = intercept + beta * tanh(difference in length / its standard deviation), in which a tie
    is half a win. The rate is the sigmoid of the intercept, None if there is no verdict at all. AlpacaEval's third term, the
    difficulty of an instruction, is left out: it is estimated over many models.

    Two tied prompts are added, one that only the intercept sees and one that only beta sees. They are log-F(1, 1) priors
    (Greenland and Mansournia 2015, https://doi.org/10.1002/sim.6537), with which the estimate exists for few prompts and
    where length tells all wins from all losses. With lengths that are equal the rate is (points + 1/2) / (prompts + 1).

    Examples:
        >>> longer_wins = pl.Series(["win"] * 6 + ["loss"] * 2)
        >>> lengths, others = pl.Series([90, 80, 95, 70, 85, 90, 20, 30]), pl.Series([50] * 8)
        >>> round(win_rate(longer_wins), 3), round(length_controlled_win_rate(longer_wins, lengths, others), 3)
        (0.75, 0.573)
    """
    differences, points = _length_differences(judged, lengths, other_lengths), _points(judged)
    return float(_controlled_rates(differences, points, np.ones((1, len(points))))[0]) if len(points) else None


def length_controlled_interval(
    judged: pl.Series, lengths: pl.Series, other_lengths: pl.Series, random_seed: int
) -> tuple[float, float] | None:
    """The percentile bootstrap interval of `length_controlled_win_rate` over prompts, 95 %; None if there is no verdict.

    Each resample goes through the whole estimate. It may also draw the tied prompt that the prior adds, as a win or a loss,
    in the proportion of one to all prompts, so that data and prior are drawn together: else
    prompts that were all won would leave no width.

    Examples:
        >>> longer_wins = pl.Series(["win"] * 6 + ["loss"] * 2)
        >>> lengths, others = pl.Series([90, 80, 95, 70, 85, 90, 20, 30]), pl.Series([50] * 8)
        >>> [round(end, 2) for end in length_controlled_interval(longer_wins, lengths, others, random_seed=0)]
        [0.31, 0.88]
    """
    rate = length_controlled_win_rate(judged, lengths, other_lengths)
    if rate is None:
        return None
    differences, points = _length_differences(judged, lengths, other_lengths), _points(judged)
    # What is drawn must not depend on the order of the prompts.
    order = np.lexsort((points, differences))
    differences, points = np.append(differences[order], [0, 0]), np.append(points[order], [1, 0])
    prompts = len(order)
    chances = np.append(np.ones(prompts), [0.5, 0.5]) / (prompts + 1)
    draw, rates = np.random.default_rng(random_seed), list[np.ndarray]()
    for times in _in_parts(CONTROLLED_RESAMPLES, len(points)):
        rates.append(_controlled_rates(differences, points, draw.multinomial(prompts, chances, size=times)))
    low, high = np.quantile(np.concatenate(rates), [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return min(float(low), rate), max(float(high), rate)


def alike_in_length(judged: pl.Series, lengths: pl.Series, other_lengths: pl.Series) -> int:
    """How many pairs with a verdict have answers of about the same length, at a ratio from 0.8 to 1.25.

    Where there are few, the length-controlled win rate is read off a fitted curve and was hardly seen.

    Examples:
        >>> alike_in_length(pl.Series(["win", "win", "loss", NO_VERDICT]), pl.Series([80, 79, 0, 9]), pl.Series([100, 100, 0, 9]))
        2
    """
    within = (5 * lengths >= 4 * other_lengths) & (5 * other_lengths >= 4 * lengths)
    return int((within & (judged != NO_VERDICT)).sum())


def win_rates(
    frame: pl.DataFrame, judges: dict[str, str], opponents: dict[str, str], answer: str, random_seed: int
) -> pl.DataFrame:
    """What each judge makes of each comparison: one row per judge and opponent.

    The frame has one row per prompt, with the outcomes (`judge_over_initial`) and the answers. `judges` gives each its label,
    `opponents` the column of its answers, and `answer` is the column that is compared with these.
    """
    rows = []
    for judge, label in judges.items():
        for opponent, column in opponents.items():
            judged = frame[f"{judge}_over_{opponent}"]
            lengths, others = (frame[name].str.len_chars().cast(pl.Int64) for name in (answer, column))
            controlled = length_controlled_interval(judged, lengths, others, random_seed) or (None, None)
            rows.append(
                {
                    "judge": judge,
                    "label": label,
                    "opponent": opponent,
                    **_counted(judged),
                    "no_verdict": int((judged == NO_VERDICT).sum()),
                    "length_controlled": length_controlled_win_rate(judged, lengths, others),
                    "length_controlled_low": controlled[0],
                    "length_controlled_high": controlled[1],
                    "alike_in_length": alike_in_length(judged, lengths, others),
                }
            )
    numbers = dict.fromkeys(
        ("win_rate", "low", "high", "length_controlled", "length_controlled_low", "length_controlled_high"), pl.Float64
    )
    return pl.DataFrame(rows, schema_overrides=numbers)


def _highest_rate(wins: int, ties: int, losses: int) -> float:
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
        if prompts * difference - (wins - losses) > QUANTILE * math.sqrt(max(prompts * variance, 0)):
            high = middle
        else:
            low = middle
    return high


def wins_by_ending(frame: pl.DataFrame, judges: dict[str, str]) -> pl.DataFrame:
    """What each judge makes of M_t beside M_0 by which answers ended by themselves: a row per judge and case.

    The frame has the outcomes (`judge_over_initial`) and whether each answer was cut. Where both ended, a judge cannot go
    by the cut; what M_t wins there is closer to what its content wins.
    """
    rows = []
    for judge, label in judges.items():
        for ended, (candidate_cut, initial_cut) in ENDINGS.items():
            judged = frame.filter(candidate_cut=candidate_cut, initial_cut=initial_cut)[f"{judge}_over_initial"]
            rows.append({"judge": judge, "label": label, "ended": ended, **_counted(judged)})
    return pl.DataFrame(rows, schema_overrides=dict.fromkeys(("win_rate", "low", "high"), pl.Float64))


def _counted(judged: pl.Series) -> dict[str, float | None]:
    """Outcomes by kind, prompts with a verdict, and the win rate with its interval."""
    wins, ties, losses = (int((judged == outcome).sum()) for outcome in POINTS)
    low, high = win_rate_interval(judged) or (None, None)
    counts = {"wins": wins, "ties": ties, "losses": losses, "prompts": wins + ties + losses}
    return {**counts, "win_rate": win_rate(judged), "low": low, "high": high}


def _points(judged: pl.Series) -> np.ndarray:
    """1 for a win, 0.5 for a tie, 0 for a loss; outcomes without a verdict are left out."""
    return judged.filter(judged != NO_VERDICT).replace_strict(POINTS, return_dtype=pl.Float64).to_numpy()


def _length_differences(judged: pl.Series, lengths: pl.Series, other_lengths: pl.Series) -> np.ndarray:
    """How much longer the first answer is, where there is a verdict."""
    return (lengths - other_lengths).filter(judged != NO_VERDICT).cast(pl.Float64).to_numpy()


def _in_parts(times: int, values: int) -> list[int]:
    """So many times in parts, each with a table of values that the processor can keep at hand."""
    part = max(1, TABLE_VALUES // values)
    return [min(part, times - done) for done in range(0, times, part)]


def _controlled_rates(differences: np.ndarray, points: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The length-controlled win rate for each row of weights, which say how often each prompt counts."""
    count = weights.sum(axis=1, keepdims=True)
    means = (weights * differences).sum(axis=1, keepdims=True) / count
    spread = np.sqrt((weights * (differences - means) ** 2).sum(axis=1, keepdims=True) / count)
    # Without any spread nothing can be said about length.
    feature = np.tanh(np.divide(differences, spread, out=np.zeros(weights.shape), where=spread > 0))
    intercepts, _ = _logistic_regressions(feature, points, weights)
    return _sigmoid(intercepts)


def _logistic_regressions(
    feature: np.ndarray, points: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Intercept and slope that make the points likeliest under log-F(1, 1) priors, for each row, by Newton's method."""

    def cost(intercept: np.ndarray, slope: np.ndarray) -> np.ndarray:
        """The negative log-likelihood."""
        logits = intercept[:, None] + slope[:, None] * feature
        priors = sum(np.logaddexp(0, each) - each / 2 for each in (intercept, slope))
        return (weights * (np.logaddexp(0, logits) - points * logits)).sum(axis=1) + priors

    intercept, slope = np.zeros((2, len(weights)))
    current = cost(intercept, slope)
    for _ in range(MOST_STEPS):
        likely = _sigmoid(intercept[:, None] + slope[:, None] * feature)
        left, curved = weights * (points - likely), weights * likely * (1 - likely)
        (prior, prior_slope) = (_sigmoid(each) for each in (intercept, slope))
        up, up_slope = left.sum(axis=1) + 0.5 - prior, (left * feature).sum(axis=1) + 0.5 - prior_slope
        bend = curved.sum(axis=1) + prior * (1 - prior)
        bend_slope = (curved * feature**2).sum(axis=1) + prior_slope * (1 - prior_slope)
        mixed = (curved * feature).sum(axis=1)
        determinant = bend * bend_slope - mixed**2
        step = (bend_slope * up - mixed * up_slope) / determinant
        step_slope = (bend * up_slope - mixed * up) / determinant
        # A whole step may lead too far where wins and losses are nearly told apart; half of it, and so on, does not.
        while True:
            new = cost(intercept + step, slope + step_slope)
            # By more than the last digits, which a step near the end cannot improve.
            too_far = new > current * (1 + 1e-12)
            if not too_far.any():
                break
            step, step_slope = (np.where(too_far, each / 2, each) for each in (step, step_slope))
        intercept, slope, current = intercept + step, slope + step_slope, new
        # Each step squares what is left of the error.
        if max(np.abs(step).max(), np.abs(step_slope).max()) < 1e-8:
            break
    return intercept, slope


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -logits))
