"""The iterations, as partitions of the assets."""

import re

import dagster as dg

from resources.settings.settings import Settings


def iterations(settings: Settings) -> dg.StaticPartitionsDefinition:
    """The partitions of an experiment: `0001` to max_iterations."""
    return dg.StaticPartitionsDefinition([partition_key(number) for number in range(1, settings.max_iterations + 1)])


def iteration_of(context: dg.AssetExecutionContext) -> int:
    """The iteration of the running asset, counted from 1."""
    return int(context.partition_key)


def partition_of(context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext) -> str | None:
    """The partition key of the running asset; None if it is made once."""
    return context.partition_key if context.has_partition_key else None


def stated_iteration(text: str) -> int | None:
    """The iteration that a word of a command names, with or without the noughts of its key; None if it names none.

    Examples:
        >>> [stated_iteration(text) for text in ("2", "0002", "²", "9" * 5000)]
        [2, 2, None, None]
    """
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else None


def partition_key(iteration: int) -> str:
    """The partition key of an iteration: 1 -> `0001`."""
    return f"{iteration:04d}"
