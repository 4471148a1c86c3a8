"""A reward model or pair ranker as judge."""

import dataclasses
from collections.abc import Callable, Sequence

from resources.scoring.scorer import Comparison, RewardScorer
from resources.storage.checkpoint_store import Checkpoint


@dataclasses.dataclass(frozen=True)
class RewardJudge:
    """Prefers the answer that a model scores higher.

    Attributes:
        name: A word that columns and figures are named by.
        label: The judge as people name it.
        scorer: How the model is asked.
        model: The model.
    """

    name: str
    label: str
    scorer: RewardScorer
    model: Checkpoint

    def compare(self, rows: Sequence[tuple[str, str, str]], log: Callable[[str], None]) -> Comparison:
        """Scores two answers to each prompt."""
        return self.scorer.compare(self.model, rows, log)
