"""The gate between two iterations: whether the newest one was good enough to go on."""

from collections.abc import Mapping
from typing import TypeVar

Name = TypeVar("Name", bound=str)


def gate_reason(
    figures: Mapping[Name, float | None], minimum: Mapping[Name, float], maximum: Mapping[Name, float]
) -> str | None:
    """Why to stop, or None to go on.

    Args:
        figures: What was measured, by name.
        minimum: Least allowed value, by name.
        maximum: Most allowed value, by name.

    Examples:
        >>> gate_reason({"win_rate": 0.41}, {"win_rate": 0.5}, {})
        'win_rate is 0.41, less than 0.5'
        >>> gate_reason({"win_rate": 0.61}, {"win_rate": 0.5}, {}) is None
        True
        >>> gate_reason({}, {}, {"repetition": 0.2})
        'repetition was not measured'
    """
    reasons = []
    for name in dict.fromkeys([*minimum, *maximum]):
        value = figures.get(name)
        if value is None:
            reasons.append(f"{name} was not measured")
        elif name in minimum and value < minimum[name]:
            reasons.append(f"{name} is {value:.3g}, less than {minimum[name]:g}")
        elif name in maximum and value > maximum[name]:
            reasons.append(f"{name} is {value:.3g}, more than {maximum[name]:g}")
    return "; ".join(reasons) or None
