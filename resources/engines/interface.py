"""What every generation engine takes and gives."""

import dataclasses
from collections.abc import Generator, Sequence
from typing import Literal, Protocol

from resources.settings import Sampling


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

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Generator[list[Completion], None, None]:
        """Completes every request once, in any order, and yields completions as soon as some are done.

        An engine that loads its model here yields an empty list when that is done. Closing the generator ends the work.
        """
        ...
