"""What every generation engine takes and gives."""

import dataclasses
from collections.abc import Generator, Iterator
from typing import Literal, Protocol

import polars as pl

from resources.settings import Sampling

TURNED_AT_A_TIME = 512


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to complete.

    Attributes:
        key: Identifies the request; carried over to its completion.
        token_ids: The rendered prompt.
        seed: Seed of this request's own random stream.
    """

    key: str
    token_ids: list[int]
    seed: int


class Requests:
    """Prompts to complete, longest first, so that running out of memory shows at once and not after hours.

    They are held as one table and become `Request` objects while they are iterated over: a hundred thousand prompts
    take little memory.

    Attributes:
        longest: Tokens of the longest prompt.
    """

    def __init__(self, table: pl.DataFrame, wanted: pl.Series | None = None) -> None:
        """Takes prompts without copying them.

        Args:
            table: Has the columns key (32 hex digits, which also give the seed) and token_ids.
            wanted: Of each row, whether it is to be completed. None: all are.
        """
        lengths = table.select(length=pl.col("token_ids").list.len()).with_row_index("place")
        ordered = lengths.filter(True if wanted is None else wanted).sort(
            "length", descending=True, maintain_order=True
        )
        self._table, self._places = table, ordered["place"]
        self.longest = int(ordered["length"][0]) if ordered.height else 0

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Request]:
        for start in range(0, len(self), TURNED_AT_A_TIME):
            block = self._table[self._places[start : start + TURNED_AT_A_TIME]]
            for key, token_ids in block.select("key", "token_ids").iter_rows():
                yield Request(key, token_ids, seed=int(key[:16], 16) >> 1)


@dataclasses.dataclass(frozen=True)
class Completion:
    """What the model wrote.

    Attributes:
        key: The key of the request.
        text: The text, without special tokens.
        input_tokens: Tokens of the prompt.
        output_tokens: Tokens written, the end-of-turn token included.
        finish_reason: `stop` if the model ended by itself or hit a stop text, `length` if it was cut.
    """

    key: str
    text: str
    input_tokens: int
    output_tokens: int
    finish_reason: Literal["stop", "length"]


class GenerationEngine(Protocol):
    """A loaded or reachable model that completes requests."""

    def generate(self, requests: Requests, sampling: Sampling) -> Generator[list[Completion], None, None]:
        """Completes every request once, in any order, and yields completions as soon as some are done.

        An engine that loads its model here yields an empty list when that is done. Closing the generator ends the work.
        """
        ...
