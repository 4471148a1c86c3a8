"""What the reports know of one finished iteration."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

import polars as pl

from synpo_assets.graph.metrics import Metric, MetricName, Metrics, Which


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
        settings: What its assets read of the settings, by dotted name.
        refusal: Why M_t was not promoted, as a sentence; None if it was, or was not judged.
        no_better_than_length: How often the judge and length alone are right about held-out gold, as a sentence; None if the low
            end of the judge's interval lies above.
        judge_doubt: Why the independent judge's win rates say nothing and are left out, as a sentence; None if they are not.
        cost: What its steps cost; None if the settings do not say what an hour costs.
    """

    key: str
    metrics: Metrics
    seconds: float
    pairs: pl.DataFrame
    training_log: Sequence[Mapping[str, Any]]
    reward_axis: str
    manifest: Mapping[str, Any]
    settings: Mapping[str, str]
    refusal: str | None
    judge_doubt: str | None = None
    no_better_than_length: str | None = None
    cost: str | None = None

    @property
    def number(self) -> int:
        """The iteration, as in M_t."""
        return int(self.key)

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


# What a row of the report shows of an iteration.
Cell = Callable[[FinishedIteration], str]


def value_cell(
    metric: MetricName, form: Callable[[float | None], str], of: str | None = None, **which: Unpack[Which]
) -> Cell:
    """The value of a metric."""
    return lambda iteration: form(iteration.metrics.value(metric, of, **which))


def metric_cell(metric: MetricName, form: Callable[[Metric | None], str], of: str, **which: Unpack[Which]) -> Cell:
    """A metric with what stands beside its value, such as its interval."""
    return lambda iteration: form(iteration.metrics.find(metric, of, **which))
