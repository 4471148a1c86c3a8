"""Metrics as text: numbers, shares, and differences with their intervals."""

from synpo_assets.graph.metrics import Metric

MISSING = "—"


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
    text = f"{rate.value:.1%}"
    return text if rate.low is None or rate.high is None else f"{text} ({100 * rate.low:.1f} to {100 * rate.high:.1f})"


def gain_text(gain: Metric | None) -> str:
    """A difference of two shares with its interval, in percentage points.

    Examples:
        >>> gain_text(Metric("verifiable_gain", 0.125, low=-0.0139, high=0.25))
        '+12.5 points (-1.4 to +25.0)'
        >>> gain_text(None)
        '—'
    """
    if gain is None or gain.value is None or gain.low is None or gain.high is None:
        return MISSING
    return f"{100 * gain.value:+.1f} points ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"


def difference_text(difference: Metric | None) -> str:
    """A difference that is not one of shares, with its interval.

    Examples:
        >>> difference_text(Metric("gold_log_likelihood_gain", 0.0494, low=0.0228, high=0.074))
        '+0.049 (+0.023 to +0.074)'
    """
    if difference is None or difference.value is None or difference.low is None or difference.high is None:
        return MISSING
    return f"{difference.value:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"


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
    text = f"{estimate.value:.3f}"
    return (
        text if estimate.low is None or estimate.high is None else f"{text} ({estimate.low:.3f} to {estimate.high:.3f})"
    )


def count_text(value: float | None) -> str:
    """A whole number."""
    return MISSING if value is None else f"{value:,.0f}"


def number_text(value: float | None) -> str:
    """A number with three digits after the point."""
    return MISSING if value is None else f"{value:.3f}"


def share_text(value: float | None) -> str:
    """A share in percent."""
    return MISSING if value is None else f"{value:.1%}"
