"""Metrics as text: numbers, shares, and differences with their intervals."""

import re

from resources.common.text import duration
from synpo_assets.graph.metrics import Metric, MetricName

MISSING = "—"
NO_INTERVAL = " (no interval)"
# By the names of metrics: those that are shares, and those that are differences of two.
SHARE = re.compile(r"(_share|_rate|_accuracy|win_rate.*|edits_[a-z]+)")
GAIN_OF_SHARES = re.compile(r"(verifiable|rule_rate|win_rate|edits_[a-z]+)_gain")


def rate_text(rate: Metric | None) -> str:
    """A share with its interval, as far as it is known.

    Examples:
        >>> rate_text(Metric("win_rate", 0.625, low=0.46875, high=0.78125))
        '62.5% (46.9 to 78.1)'
        >>> rate_text(Metric("win_rate", 0.625))
        '62.5%'
        >>> rate_text(None)
        '—'
    """
    if rate is None or rate.value is None:
        return MISSING
    return f"{rate.value:.1%}{_interval(rate, '.1f', 100)}"


def gain_text(gain: Metric | None) -> str:
    """A difference of two shares with its interval, in percentage points.

    Examples:
        >>> gain_text(Metric("verifiable_gain", 0.125, low=-0.0139, high=0.25))
        '+12.5 points (-1.4 to +25.0)'
        >>> gain_text(Metric("verifiable_gain", 0.0)), gain_text(None)
        ('+0.0 points (no interval)', '—')
    """
    if gain is None or gain.value is None:
        return MISSING
    return f"{100 * gain.value:+.1f} points{_interval(gain, '+.1f', 100) or NO_INTERVAL}"


def difference_text(difference: Metric | None) -> str:
    """A difference that is not one of shares, with its interval.

    Examples:
        >>> difference_text(Metric("gold_log_likelihood_gain", 0.0494, low=0.0228, high=0.074))
        '+0.049 (+0.023 to +0.074)'
    """
    if difference is None or difference.value is None:
        return MISSING
    return f"{difference.value:+.3f}{_interval(difference, '+.3f') or NO_INTERVAL}"


def estimate_text(estimate: Metric | None) -> str:
    """A number with its interval, as far as it is known.

    Examples:
        >>> estimate_text(Metric("mean_similarity", 0.0719, low=0.0681, high=0.0774))
        '0.072 (0.068 to 0.077)'
        >>> estimate_text(Metric("mean_similarity", 0.0719))
        '0.072'
    """
    if estimate is None or estimate.value is None:
        return MISSING
    return f"{estimate.value:.3f}{_interval(estimate, '.3f')}"


def metric_text(name: MetricName, value: float | None) -> str:
    """The value of a metric in its unit, with four digits.

    Examples:
        >>> metric_text("win_rate", 0.58333333), metric_text("verifiable_gain", -0.0139), metric_text("mean_margin", 3.31604)
        ('58.3%', '-1.4 points', '3.316')
        >>> metric_text("trained_tokens", 1234567.0), metric_text("training_seconds", 150.2), metric_text("peak_memory_gb", 1.23456)
        ('1,234,567', '2.5 min', '1.235 GB')
    """
    if value is None:
        return MISSING
    if GAIN_OF_SHARES.fullmatch(name):
        return f"{100 * value:+.1f} points"
    if SHARE.search(name) and not name.endswith("_gain"):
        return f"{value:.1%}"
    if name.endswith("_seconds"):
        return duration(value)
    unit = " GB" if name.endswith("_gb") else " tokens/s" if name.endswith("_per_second") else ""
    is_whole = float(value).is_integer() or abs(value) >= 1000
    return f"{value:,.0f}{unit}" if is_whole else f"{value:.4g}{unit}"


def count_text(value: float | None) -> str:
    """A whole number."""
    return MISSING if value is None else f"{value:,.0f}"


def number_text(value: float | None) -> str:
    """A number with three digits after the point."""
    return MISSING if value is None else f"{value:.3f}"


def share_text(value: float | None) -> str:
    """A share in percent."""
    return MISSING if value is None else f"{value:.1%}"


def _interval(metric: Metric, form: str, scale: int = 1) -> str:
    """The interval behind a value; nothing if it is not known."""
    if metric.low is None or metric.high is None:
        return ""
    return f" ({scale * metric.low:{form}} to {scale * metric.high:{form}})"
