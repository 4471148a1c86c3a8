"""How rows of different length are put into batches."""

from collections.abc import Iterator, Sequence

from resources.models.device import prepare_device
from resources.settings.machine import Engine

# A CPU reads more at once no faster, and is silent meanwhile.
CPU_TOKENS = 2048


def tokens_at_a_time(engine: Engine) -> int:
    """The size of a batch that is read, and not written."""
    return min(engine.batch_tokens, CPU_TOKENS) if prepare_device(engine) == "cpu" else engine.batch_tokens


def longest_first(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Places of rows in batches of at most so many tokens, padding included; a row that is longer stands alone.

    Longest first keeps padding small, and what does not fit into memory shows at once. No row may have length 0.

    Examples:
        >>> list(longest_first([2, 9, 3, 3], 6))
        [[1], [2, 3], [0]]
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    while order:
        count = max(1, batch_tokens // lengths[order[0]])
        yield order[:count]
        order = order[count:]
