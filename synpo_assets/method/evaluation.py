"""Comparing two models on the same prompts: win rates, how certain they are, and what length has to do with them."""

import math
from statistics import NormalDist

import numpy as np
import polars as pl

NO_VERDICT = "no verdict"
POINTS = {"win": 1.0, "tie": 0.5, "loss": 0.0}
RESAMPLES = 10_000
COVERAGE = 0.95
QUANTILE = NormalDist().inv_cdf((1 + COVERAGE) / 2)
HALVINGS = 60  # More than a floating-point number has digits.
MOST_STEPS = 100


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
    has_verdict = (judged != NO_VERDICT).to_numpy()
    points = _points(judged)
    if not len(points):
        return None
    differences = (lengths - other_lengths).to_numpy()[has_verdict].astype(float)
    spread = differences.std()
    # Without any spread nothing can be said about length.
    feature = np.tanh(differences / spread) if spread > 0 else np.zeros_like(differences)
    intercept, _ = _logistic_regression(feature, points)
    return float(_sigmoid(intercept))


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
            counts = {outcome: int((judged == outcome).sum()) for outcome in (*POINTS, NO_VERDICT)}
            low, high = win_rate_interval(judged) or (None, None)
            lengths, others = (frame[name].str.len_chars().cast(pl.Int64) for name in (answer, column))
            rows.append(
                {
                    "judge": judge,
                    "label": label,
                    "opponent": opponent,
                    "wins": counts["win"],
                    "ties": counts["tie"],
                    "losses": counts["loss"],
                    "no_verdict": counts[NO_VERDICT],
                    "prompts": judged.len() - counts[NO_VERDICT],
                    "win_rate": win_rate(judged),
                    "low": low,
                    "high": high,
                    "length_controlled": length_controlled_win_rate(judged, lengths, others),
                }
            )
    numbers = dict.fromkeys(("win_rate", "low", "high", "length_controlled"), pl.Float64)
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


def _points(judged: pl.Series) -> np.ndarray:
    """1 for a win, 0.5 for a tie, 0 for a loss; outcomes without a verdict are left out."""
    return judged.filter(judged != NO_VERDICT).replace_strict(POINTS, return_dtype=pl.Float64).to_numpy()


def _logistic_regression(feature: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Intercept and slope that make the points likeliest under log-F(1, 1) priors, by Newton's method."""
    design = np.vstack([np.column_stack([np.ones_like(feature), feature]), np.eye(2)])
    target = np.append(points, [0.5, 0.5])
    found, cost = np.zeros(2), _cost(np.zeros(2), design, target)
    for _ in range(MOST_STEPS):
        likely = _sigmoid(design @ found)
        step = np.linalg.solve(design.T @ (design * (likely * (1 - likely))[:, None]), design.T @ (target - likely))
        # A whole step may lead too far where wins and losses are nearly told apart; half of it, and so on, does not.
        while (new := _cost(found + step, design, target)) > cost and np.abs(step).max() > 1e-12:
            step /= 2
        found, cost = found + step, new
        if np.abs(step).max() < 1e-10:
            break
    return found


def _cost(coefficients: np.ndarray, design: np.ndarray, target: np.ndarray) -> float:
    """The negative log-likelihood."""
    logits = design @ coefficients
    return float((np.logaddexp(0, logits) - target * logits).sum())


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -logits))
