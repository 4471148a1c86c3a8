"""What every generation engine takes and gives."""

import array
import dataclasses
from collections.abc import Generator, Iterator
from typing import Literal, Protocol

import polars as pl

from resources.settings.method import Sampling


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to complete."""

    key: str
    token_ids: list[int]
    seed: int


class Requests:
    """Prompts to complete, longest first, so that running out of memory shows at once and not after hours.

    Their token ids lie in one array and become `Request` objects while they are iterated over: a hundred thousand
    prompts take little memory, and all of it is given back when they are done. `longest` is the longest one's number of tokens.
    """

    def __init__(self, table: pl.DataFrame, token_ids: "array.array[int]") -> None:
        """Takes prompts without copying them.

        The table has the columns key (32 hex digits, which also give the seed), start and length: where the prompt lies in
        the token ids.
        """
        self._table = table.select("key", "start", "length").sort("length", descending=True, maintain_order=True)
        self._token_ids = token_ids
        self.longest = int(self._table["length"][0]) if table.height else 0

    def __len__(self) -> int:
        return self._table.height

    def __iter__(self) -> Iterator[Request]:
        for key, start, length in self._table.iter_rows():
            yield Request(key, self._token_ids[start : start + length].tolist(), seed=int(key[:16], 16) >> 1)


@dataclasses.dataclass(frozen=True)
class Completion:
    """What the model wrote."""

    key: str
    text: str
    input_tokens: int
    output_tokens: int  # The end-of-turn token included.
    finish_reason: Literal["stop", "length"]  # `stop` if the model ended by itself or hit a stop text.


class GenerationEngine(Protocol):
    """A loaded or reachable model that completes requests."""

    def generate(self, requests: Requests, sampling: Sampling) -> Generator[list[Completion], None, None]:
        """Completes every request once, in any order, and yields completions as soon as some are done.

        An engine that loads its model here yields an empty list when that is done. Closing the generator ends the work.
        """
