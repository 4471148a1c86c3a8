"""What every judge takes and gives, and a model with scores as judge."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from resources.scoring.scorer import Comparison, RewardScorer
from resources.storage.checkpoint_store import Checkpoint


class Judge(Protocol):
    """Compares two answers to each prompt."""

    @property
    def name(self) -> str:
        """A word that columns and metrics are named by: `judge`, `scorer` or `server`."""

    @property
    def label(self) -> str:
        """The judge as people name it, which says whether it took part in training."""

    def compare(self, rows: Sequence[tuple[str, str, str]]) -> Comparison:
        """Scores two answers to a prompt in each row; where there is no verdict, both scores are missing."""


@dataclasses.dataclass(frozen=True)
class RewardJudge:
    """Prefers the answer that a reward model or pair ranker scores higher."""

    name: str
    label: str
    scorer: RewardScorer
    model: Checkpoint

    def compare(self, rows: Sequence[tuple[str, str, str]]) -> Comparison:
        """Scores two answers to each prompt, a pair ranker in both orders."""
        return self.scorer.compare(self.model, rows, judging=True)
