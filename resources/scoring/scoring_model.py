"""What a scorer's model reads and says: the interface between the scorer and its models."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

from resources.settings.machine import Engine

BOTH_ORDERS = (("first", "second"), ("second", "first"))


@dataclasses.dataclass(frozen=True)
class Reading:
    """A prompt with the answers that are read together with it: one for a reward model, two for a pair ranker."""

    key: str
    token_ids: list[int]
    marks: list[int]  # Where prompt and answers begin in `token_ids`; may be empty.
    prompt_cut: bool
    answers_cut: list[bool]  # Of each answer, whether its end is unseen.


@dataclasses.dataclass(frozen=True)
class Convention:
    """What a margin is: the difference of two scores, each taken together over the readings that contain an answer."""

    readings: tuple[tuple[str, ...], ...]  # Which answers of a row are read together, in this order.
    is_sum: bool = False  # Whether the scores of several readings are added up, or their mean is taken.


class ScoringModel(Protocol):
    """A model that scores the answers of readings; its conventions are by the name that a section of the settings gives them."""

    answers_per_reading: ClassVar[int]
    conventions: ClassVar[Mapping[str, Convention]]

    def __init__(self, weights: str, engine: Engine, max_length: int) -> None:
        """Loads the weights from a directory."""

    @staticmethod
    def check(directory: Path, trust_remote_code: bool, section: str) -> None:
        """Refuses a published model that is not of this kind, before anything is scored; `section` of the settings names it."""

    def read(self, key: str, prompt: str, answers: Sequence[str]) -> Reading:
        """Tokenizes a prompt and the answers that are read together, cut to the longest length allowed."""

    def score(self, readings: Sequence[Reading]) -> list[list[float]]:
        """Scores one batch: for each reading a number per answer, of which higher is better."""
