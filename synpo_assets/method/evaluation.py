"""Comparing two models by the scores of their answers."""

from collections.abc import Sequence


def win_rate(scores: Sequence[float], other_scores: Sequence[float]) -> float:
    """The share of prompts where the first answer scores higher; a tie counts half.

    Examples:
        >>> win_rate([1.0, 0.0, 2.0], [0.0, 0.0, 3.0])
        0.5
    """
    points = [(score > other) + 0.5 * (score == other) for score, other in zip(scores, other_scores, strict=True)]
    return sum(points) / len(points)
