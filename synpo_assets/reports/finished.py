"""What the reports know of one finished iteration."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from synpo_assets.graph.metrics import Metrics


@dataclasses.dataclass(frozen=True)
class FinishedIteration:
    """What is known of one finished iteration.

    Attributes:
        key: Its partition key, `0001`.
        metrics: What its assets measured.
        seconds: Wall time of its steps.
        pairs: Its table `preference_pairs`.
        training_log: What the trainer of M_t logged, one entry per step; empty if the checkpoint is gone.
        reward_axis: What the logged rewards are, which depends on the loss.
        manifest: The manifest of M_t; empty if the checkpoint is gone.
        refusal: Why M_t was not promoted, as a sentence; None if it was, or was not judged.
        judge_doubt: Why the independent judge's win rates say nothing and are left out, as a sentence; None if they are not.
    """

    key: str
    metrics: Metrics
    seconds: float
    pairs: pl.DataFrame
    training_log: Sequence[Mapping[str, Any]]
    reward_axis: str
    manifest: Mapping[str, Any]
    refusal: str | None
    judge_doubt: str | None = None

    @property
    def sha(self) -> str | None:
        """Sha of M_t."""
        evaluated = self.metrics.find("mean_repetition", "candidate")
        return evaluated.checkpoint_sha if evaluated else None

    @property
    def promoted(self) -> bool | None:
        """Whether the gate let this M_t enter the next iteration; None if it judged another one, or none yet."""
        judged = self.metrics.find("promoted", "candidate")
        return bool(judged.value) if judged and judged.checkpoint_sha == self.sha else None

    @property
    def rewards(self) -> list[Mapping[str, Any]]:
        """The logged steps that hold the rewards of chosen and rejected; the trainer's closing entry has none."""
        return [entry for entry in self.training_log if entry.get("rewards/chosen") is not None]

    @property
    def funnel(self) -> dict[str, float | None]:
        """Rows per stage, from the completions that were asked for a prompt to the pairs that were kept."""
        value = self.metrics.value
        return {
            "prompts asked for": value("keyword_sets_used"),
            "valid prompts": value("rows", asset="synthetic_prompts"),
            "candidate pairs": value("candidate_pairs"),
            "pairs kept": value("rows", asset="preference_pairs"),
        }
