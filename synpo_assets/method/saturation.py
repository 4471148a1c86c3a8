"""Whether the training on pairs is saturated, so that the scale beta of the rewards hardly matters (not in the paper)."""

import math


def saturation(
    accuracy: float | None, argument: float | None, least_accuracy: float, least_argument: float
) -> str | None:
    """Why a training counts as saturated, as a clause; None if it does not, or nothing is known of it.

    Where the sigmoid of the loss is taken of a number far below zero, the gradient of a pair has nearly the weight 1, whatever
    beta is.

    Args:
        accuracy: The share of pairs whose chosen side has the higher reward, late in training.
        argument: The mean of what the loss's sigmoid is taken of: margin - gamma for SimPO.

    Examples:
        >>> saturation(0.625, -6.0, 0.5, -4.0)
        "the argument of the loss's sigmoid is -6.00, below -4, where a pair pulls with 99.8% of its full weight"
        >>> saturation(0.5, -4.0, 0.5, -4.0) is None
        True
    """
    reasons = []
    if accuracy is not None and accuracy < least_accuracy:
        reasons.append(f"the reward accuracy is {accuracy:.1%}, below {least_accuracy:.0%}")
    if argument is not None and argument < least_argument:
        weight = 1 / (1 + math.exp(max(argument, -100.0)))
        reasons.append(
            f"the argument of the loss's sigmoid is {argument:.2f}, below {least_argument:g}, where a pair pulls with "
            f"{weight:.1%} of its full weight"
        )
    return ", and ".join(reasons) or None
