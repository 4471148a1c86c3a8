"""What every generation engine takes and gives."""

import array
import dataclasses
import os
from collections.abc import Generator, Iterator
from typing import IO, Literal, Protocol

import polars as pl

from resources.generation.failures import RefusedError
from resources.settings.method import Sampling


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to complete."""

    key: int
    token_ids: list[int]
    seed: int


class Requests:
    """Prompts to complete, longest first, so that running out of memory shows at once and not after hours.

    Their token ids lie in a file and become `Request` objects while they are iterated over, so that a hundred thousand
    prompts take little memory. `longest` is the longest one's number of tokens.
    """

    def __init__(self, table: pl.DataFrame, token_ids: IO[bytes]) -> None:
        """Takes an open file of token ids, and where in it each prompt lies.

        The table has the columns key (64 bits at random, which also give the seed), start in bytes, and length in tokens.
        """
        self._table = table.select("key", "start", "length").sort("length", descending=True, maintain_order=True)
        self._token_ids = token_ids
        self.longest = int(self._table["length"][0]) if table.height else 0

    def __len__(self) -> int:
        return self._table.height

    def __iter__(self) -> Iterator[Request]:
        for key, start, length in self._table.iter_rows():
            token_ids = array.array("i")
            # At its place, whoever else reads the file meanwhile.
            token_ids.frombytes(os.pread(self._token_ids.fileno(), length * token_ids.itemsize, start))
            yield Request(key, token_ids.tolist(), seed=key >> 1)


@dataclasses.dataclass(frozen=True)
class Completion:
    """What the model wrote."""

    key: int
    text: str
    input_tokens: int
    output_tokens: int  # The end-of-turn token included.
    finish_reason: Literal["stop", "length"]  # `stop` if the model ended by itself or hit a stop text.
    refusal: RefusedError | None = None  # Why a server wrote nothing: the text is empty then, as if cut at once.


class GenerationEngine(Protocol):
    """A loaded or reachable model that completes requests."""

    def generate(self, requests: Requests, sampling: Sampling) -> Generator[list[Completion], None, None]:
        """Completes every request once, in any order, and yields completions as soon as some are done.

        An engine that loads its model here yields an empty list when that is done. Closing the generator ends the work.
        """
