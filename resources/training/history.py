"""What the log of a training says, over more than one batch."""

import math
from collections.abc import Iterable


def last_quarter(logged: Iterable[float | None]) -> float | None:
    """The mean of a value over the last quarter of the steps that logged it, rounded up; None if none did.

    The value of one step is that of one batch, and says more about the batch than about the model.

    Examples:
        >>> last_quarter([9.0, 9.0, 9.0, 1.0, 3.0, None])
        2.0
    """
    values = [value for value in logged if value is not None]
    last = values[-math.ceil(len(values) / 4) :]
    return sum(last) / len(last) if last else None
