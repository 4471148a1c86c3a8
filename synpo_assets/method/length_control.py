"""The win rate that answers of equal length would have, as AlpacaEval 2 estimates it (arXiv 2404.04475)."""

import numpy as np
import polars as pl

from synpo_assets.method.outcomes import COVERAGE, NO_VERDICT, points_of

CONTROLLED_RESAMPLES = 1000
TABLE_VALUES = 100_000
MOST_STEPS = 100
FEWEST_ALIKE = 10
TOO_FEW_ALIKE = (
    f"fewer than {FEWEST_ALIKE} dev prompts, and than half, have answers of M_t and M_0 that are alike in length and a "
    "verdict"
)


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
        >>> round(length_controlled_win_rate(longer_wins, lengths, others), 3)  # The win rate is 0.75.
        0.573
    """
    differences, points = _length_differences(judged, lengths, other_lengths), points_of(judged)
    return float(_controlled_rates(differences, points, np.ones((1, len(points))))[0]) if len(points) else None


def length_controlled_interval(
    judged: pl.Series,
    lengths: pl.Series,
    other_lengths: pl.Series,
    random_seed: int,
    prompts: pl.Series | None = None,
    coverage: float = COVERAGE,
) -> tuple[float, float] | None:
    """The percentile bootstrap interval of `length_controlled_win_rate` over prompts, 95 %; None if there is no verdict.

    All outcomes of a prompt are drawn together; without `prompts` each has one. Each resample goes through the whole estimate.
    It may also draw the tied prompt that the prior adds, as a win or a loss, in the proportion of one to all prompts, so that
    data and prior are drawn together: else prompts that were all won would leave no width.

    Examples:
        >>> longer_wins = pl.Series(["win"] * 6 + ["loss"] * 2)
        >>> lengths, others = pl.Series([90, 80, 95, 70, 85, 90, 20, 30]), pl.Series([50] * 8)
        >>> [round(end, 2) for end in length_controlled_interval(longer_wins, lengths, others, random_seed=0)]
        [0.31, 0.88]
    """
    rate = length_controlled_win_rate(judged, lengths, other_lengths)
    if rate is None:
        return None
    known = judged != NO_VERDICT
    frame = pl.DataFrame(
        {
            "prompt": pl.arange(len(judged), eager=True).filter(known) if prompts is None else prompts.filter(known),
            "difference": _length_differences(judged, lengths, other_lengths),
            "points": points_of(judged),
        }
    )
    # What is drawn must not depend on the order of the prompts.
    by_prompt = frame.sort("difference", "points").group_by("prompt", maintain_order=True).agg("difference", "points")
    by_prompt = by_prompt.sort("difference", "points")
    answers, count = by_prompt["points"].list.len().to_numpy(), by_prompt.height
    differences = np.append(by_prompt["difference"].explode().to_numpy(), [0, 0])
    points = np.append(by_prompt["points"].explode().to_numpy(), [1, 0])
    of_prompt = np.append(np.repeat(np.arange(count), answers), [count, count + 1])
    chances = np.append(np.ones(count), [0.5, 0.5]) / (count + 1)
    draw, rates = np.random.default_rng(random_seed), list[np.ndarray]()
    for times in _in_parts(CONTROLLED_RESAMPLES, len(points)):
        drawn = draw.multinomial(count, chances, size=times)
        rates.append(_controlled_rates(differences, points, drawn[:, of_prompt]))
    low, high = np.quantile(np.concatenate(rates), [(1 - coverage) / 2, (1 + coverage) / 2])
    return min(float(low), rate), max(float(high), rate)


def alike_in_length(
    judged: pl.Series, lengths: pl.Series, other_lengths: pl.Series, prompts: pl.Series | None = None
) -> int:
    """How many prompts have a pair with a verdict whose answers are about as long, at a ratio from 0.8 to 1.25.

    Where there are few, the length-controlled win rate is read off a fitted curve and was hardly seen.

    Examples:
        >>> alike_in_length(pl.Series(["win", "win", "loss", NO_VERDICT]), pl.Series([80, 79, 0, 9]), pl.Series([100, 100, 0, 9]))
        2
    """
    within = (5 * lengths >= 4 * other_lengths) & (5 * other_lengths >= 4 * lengths)
    alike = within & (judged != NO_VERDICT)
    return int(alike.sum()) if prompts is None else prompts.filter(alike).n_unique()


def is_extrapolated(alike: float, prompts: float) -> bool:
    """Whether a length-controlled win rate is read off where hardly any pair was seen: fewer than 10 are alike, and than half.

    Examples:
        >>> is_extrapolated(6, 42), is_extrapolated(10, 42), is_extrapolated(4, 8), is_extrapolated(3, 8)
        (True, False, False, True)
    """
    return alike < FEWEST_ALIKE and 2 * alike < prompts


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
