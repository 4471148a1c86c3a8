"""The gate between two iterations: which metrics of M_t keep to their limits, and what that means for M_t."""

import bisect
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import polars as pl

from synpo_assets.method.outcomes import win_rate_interval

COMPARED_DIGITS = 9
# The true win rate of a clearly better model, and how often it should pass.
BETTER, PROMISED = 0.65, 0.8


def gate_rows(
    measured: Mapping[str, float | None],
    minimum: Mapping[str, float],
    maximum: Mapping[str, float],
    unmeasured: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Holds metrics against their limits, with the reason where one did not pass; those without a limit are left out.

    `unmeasured` says why metrics were not measured, where that is known.

    Examples:
        >>> [(row["passed"], row["reason"]) for row in gate_rows({"win_rate": 0.61}, {"win_rate": 0.5}, {})]
        [(True, None)]
        >>> [row["reason"] for row in gate_rows({"win_rate": 0.61}, {"win_rate": 0.7, "gain": 0}, {"win_rate": 0.9})]
        ['win_rate is 0.61, less than 0.7', 'gain was not measured']
        >>> gate_rows({"gain": 0.35 - 0.40}, {"gain": -0.05}, {})[0]["passed"]
        True
    """
    rows, known = [], unmeasured or {}
    for metric in dict.fromkeys([*minimum, *maximum]):
        limits = {"minimum": minimum.get(metric), "maximum": maximum.get(metric)}
        reason = _reason(metric, measured.get(metric), **limits)
        if reason is not None and metric in known:
            reason = f"{reason} ({known[metric]})"
        row = {"metric": metric, "value": measured.get(metric), **limits, "passed": reason is None, "reason": reason}
        rows.append(row)
    return rows


def verdict(rows: Iterable[Mapping[str, Any]], checkpoint: str, following: str) -> str:
    """The sentence that says whether a checkpoint becomes the next policy, and why not.

    Examples:
        >>> verdict(gate_rows({"repetition": 0.4}, {}, {"repetition": 0.2}), "model_checkpoint[0002]", "policy[0003]")
        'model_checkpoint[0002] was not promoted to policy[0003]: repetition is 0.4, more than 0.2.'
        >>> verdict([], "model_checkpoint[0002]", "policy[0003]")
        'model_checkpoint[0002] was promoted to policy[0003]: the gate has no limits.'
    """
    rows = list(rows)
    if reasons := [row["reason"] for row in rows if not row["passed"]]:
        return f"{checkpoint} was not promoted to {following}: {'; '.join(reasons)}."
    names = ", ".join(row["metric"] for row in rows)
    why = f"within the limits of the gate: {names}" if rows else "the gate has no limits"
    return f"{checkpoint} was promoted to {following}: {why}."


def gate_power(prompts: int, minimum: Mapping[str, float], error_rate: float) -> str:
    """How often a clearly better model passes the gate's low ends with so many dev prompts, as a sentence.

    Of the win rate over M_0, without ties; control for length takes some of it away.

    Examples:
        >>> gate_power(100, {"win_rate_over_previous_low": 0.5}, 0.05)
        "With 100 dev prompts, a model that truly wins 65 % of them reaches the gate's low ends in 91 % of the cases."
        >>> gate_power(16, {"win_rate_over_previous_low": 0.5}, 0.05)[86:]
        'in 29 % of the cases: more are needed (seed_data.held_out, held_out_limit, dev_share).'
        >>> gate_power(16, {}, 0.05)
        'The gate asks for no certain improvement.'
    """
    limits = [limit for name, limit in minimum.items() if name.endswith("_low")]
    if not limits:
        return "The gate asks for no certain improvement."
    is_certain = functools.partial(_is_certain, prompts=prompts, error_rate=error_rate, limit=max(limits))
    least = bisect.bisect_left(range(prompts + 1), True, key=is_certain)
    share = sum(_chance(wins, prompts) for wins in range(least, prompts + 1))
    remedy = "" if share >= PROMISED else ": more are needed (seed_data.held_out, held_out_limit, dev_share)"
    cases = f"in {100 * share:.0f} % of the cases{remedy}."
    return f"With {prompts} dev prompts, a model that truly wins 65 % of them reaches the gate's low ends {cases}"


def _chance(wins: int, prompts: int) -> float:
    """Of so many wins. By logarithms, since the factors of more than a thousand prompts are no floats."""
    ways = math.lgamma(prompts + 1) - math.lgamma(wins + 1) - math.lgamma(prompts - wins + 1)
    return math.exp(ways + wins * math.log(BETTER) + (prompts - wins) * math.log(1 - BETTER))


def _is_certain(wins: int, prompts: int, error_rate: float, limit: float) -> bool:
    outcomes = pl.Series(["win"] * wins + ["loss"] * (prompts - wins), dtype=pl.String)
    interval = win_rate_interval(outcomes, coverage=1 - 2 * error_rate)
    return interval is not None and interval[0] - 0.5 / prompts >= limit


def _reason(metric: str, value: float | None, minimum: float | None, maximum: float | None) -> str | None:
    # Every comparison with NaN is false, so it would pass.
    if value is None or math.isnan(value):
        return f"{metric} was not measured"
    # Rounded, because the difference of two shares may miss its limit in the last digit alone.
    if minimum is not None and round(value - minimum, COMPARED_DIGITS) < 0:
        return f"{metric} is {value:g}, less than {minimum:g}"
    if maximum is not None and round(value - maximum, COMPARED_DIGITS) > 0:
        return f"{metric} is {value:g}, more than {maximum:g}"
    return None
