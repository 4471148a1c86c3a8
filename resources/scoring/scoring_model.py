"""What a scorer's model reads and says: the interface between the scorer and its models."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol


@dataclasses.dataclass(frozen=True)
class Reading:
    """A prompt with the answers that are read together with it: one for a reward model, two for a pair ranker.

    Attributes:
        key: Identifies the reading.
        token_ids: What the model reads.
        marks: Places in `token_ids` where the prompt and each answer begin; empty if the model does not need them.
        prompt_cut: Whether the end of the prompt is unseen.
        answers_cut: Of each answer, whether its end is unseen.
    """

    key: str
    token_ids: list[int]
    marks: list[int]
    prompt_cut: bool
    answers_cut: list[bool]


class ScoringModel(Protocol):
    """A loaded model that scores the answers of readings."""

    def read(self, key: str, prompt: str, answers: Sequence[str]) -> Reading:
        """Tokenizes a prompt and the answers that are read together, cut to the longest length allowed."""
        ...

    def score(self, readings: Sequence[Reading]) -> list[list[float]]:
        """Scores one batch: for each reading a number per answer, of which higher is better."""
        ...
