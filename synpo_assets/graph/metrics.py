"""Metrics as data: what an asset measured, one typed row each, kept in tables beside the asset's own.

Report, gate, comparison, summary, cards, checks and plots read these rows. Event metadata shows them and is never read back.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Literal, TypedDict, Unpack, get_args

import pandera.polars as pa
import polars as pl

from resources.generation.language_model import Usage
from resources.models.embeddings import Embedded
from resources.models.likelihood import Likelihoods
from resources.scoring.scorer import ScoringUsage
from resources.storage.manifests import ONCE
from resources.storage.tables import ParquetTables
from resources.training.job import TrainingSummary
from synpo_assets.graph.tables import Table
from synpo_assets.method.judging import BOTH_ENDED, doubt
from synpo_assets.method.outcomes import share_interval
from synpo_assets.method.seed import HELD_OUT
from synpo_assets.method.verifiable import has_rules

MetricName = Literal[
    # Any table, and the process that made it.
    "rows", "peak_memory_gb", "peak_gpu_memory_gb",
    # Generating.
    "generated_tokens", "input_tokens", "output_tokens", "reused_completions", "cut_share", "generation_seconds",
    "generated_tokens_per_second", "refused_prompts",
    # Training.
    "examples", "dropped_examples", "truncated_examples", "trained_tokens", "training_steps", "training_seconds",
    "trained_tokens_per_second", "final_loss", "surviving_update", "changed_weights",
    # Scoring and embedding.
    "readings", "reused_readings", "scored_tokens", "prompts_unread", "answers_unread", "scoring_seconds",
    "scored_tokens_per_second", "embedded_texts", "embedded_tokens", "texts_unread", "embedding_seconds",
    # Seed, keywords and prompts.
    "split_rows", "with_rules", "dropped", "pool_size", "examples_without_keywords", "prompts_wanted", "keyword_sets_used",
    "sources_used", "prompts_compared", "mean_similarity", "effective_clusters", "ordered_share", "shuffled_ordered_share",
    "answerable_share", "topics", "topic_entropy", "intentions", "intention_entropy", "not_labelled",
    # Responses, scorers and pairs.
    "gold_better_share", "passing_share", "unchanged_share", "samples_per_prompt", "mean_margin_over_first_sample",
    "like_length_share", "own_answer_share", "rules_followed_share", "held_out_accuracy", "candidate_pairs", "mean_margin",
    "chosen_to_rejected_length", "pairs_of_iteration", "verdicts", "agreement_rate", "right_answers_kept",
    # Held-out prompts.
    "held_out_prompts", "held_out_reward", "win_rate", "length_controlled_win_rate", "pairs_alike_in_length", "wins", "ties",
    "losses", "no_verdicts", "win_rate_both_ended", "wins_both_ended", "ties_both_ended", "losses_both_ended",
    "wins_only_candidate_ended", "ties_only_candidate_ended", "losses_only_candidate_ended", "wins_only_initial_ended",
    "ties_only_initial_ended", "losses_only_initial_ended", "wins_neither_ended", "ties_neither_ended",
    "losses_neither_ended",
    "win_rate_gain", "mean_repetition", "mean_characters", "instructions", "samples_each", "verifiable_rate", "verifiable_gain",
    "constraint_rate", "rule_rate", "rule_rate_gain", "gold_log_likelihood", "gold_log_likelihood_gain",
    "other_gold_log_likelihood_gain", "gold_log_likelihood_gain_beyond_other", "gold_end_log_likelihood",
    "gold_end_log_likelihood_gain", "gold_similarity", "gold_similarity_gain", "promoted", "leaderboard_average", "answers_written",
    # What became of damaged answers.
    "edits_right", "edits_right_gain", "edits_nearer", "edits_nearer_gain", "edits_left", "edits_left_gain", "edits_worse",
    "edits_worse_gain",
]  # fmt: skip

# Wins, ties and losses by which of the two answers ended by itself.
ENDING_COUNTS: dict[str, tuple[MetricName, MetricName, MetricName]] = {
    "both_ended": ("wins_both_ended", "ties_both_ended", "losses_both_ended"),
    "only_candidate_ended": ("wins_only_candidate_ended", "ties_only_candidate_ended", "losses_only_candidate_ended"),
    "only_initial_ended": ("wins_only_initial_ended", "ties_only_initial_ended", "losses_only_initial_ended"),
    "neither_ended": ("wins_neither_ended", "ties_neither_ended", "losses_neither_ended"),
}
# What the control of equal steps is called.
EQUAL_STEPS = "equal_steps"


class MetricRows(Table):
    """Metrics of one asset and iteration."""

    asset: str = pa.Field(description="The asset that measured it.")
    iteration: int = pa.Field(ge=1, nullable=True, description="The iteration; empty for assets made once.")
    metric: str = pa.Field(isin=get_args(MetricName), description="What was measured.")
    of: str = pa.Field(
        nullable=True,
        description="Whose it is: a model, a side or kind of pairs, a source of prompts or examples, a reason.",
    )
    over: str = pa.Field(nullable=True, description="The model, or the null, that it is compared with.")
    by: str = pa.Field(
        nullable=True,
        description="The judge, what a judge goes by, the band of lengths, the rule, or the damage that it is taken over.",
    )
    value: float = pa.Field(nullable=True, description="The value; empty: it could not be measured.")
    low: float = pa.Field(nullable=True, description="Lower end of its 95 % interval.")
    high: float = pa.Field(nullable=True, description="Upper end of its 95 % interval.")
    n: int = pa.Field(nullable=True, ge=0, description="How many it is taken over.")
    checkpoint_sha: str = pa.Field(nullable=True, description="sha of the model that was measured.")
    split: str = pa.Field(
        isin=HELD_OUT,
        nullable=True,
        description="Split of the held-out prompts or verifiable instructions; empty: not of these.",
    )


SCHEMA: dict[str, Any] = {name: column.dtype.type for name, column in MetricRows.to_schema().columns.items()}


@dataclasses.dataclass(frozen=True)
class Metric:
    """One measured value; the attributes are the columns of `MetricRows`."""

    metric: MetricName
    value: float | None
    of: str | None = None
    over: str | None = None
    by: str | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    checkpoint_sha: str | None = None
    split: str | None = None

    @property
    def label(self) -> str:
        """How the UI calls it: `win_rate of candidate over initial by independent judge`."""
        parts = [self.metric, *(f"{word} {part}" for word in ("of", "over", "by") if (part := getattr(self, word)))]
        return " ".join([*parts, "(dev)"] if self.split == "dev" else parts)


class Which(TypedDict, total=False):
    """Which row of a metric is meant, besides whose it is."""

    over: str | None  # The model that it is compared with.
    by: str | None  # The judge, the band of lengths, the rule, or the damage.
    split: str  # If left out, test, which reports are of.
    asset: str | None  # The asset that measured it; if left out, the first that did.


class Metrics:
    """What was measured in one iteration, or of the assets that are made once."""

    def __init__(self, rows: pl.DataFrame) -> None:
        self.frame = rows

    def find(self, metric: MetricName, of: str | None = None, **which: Unpack[Which]) -> Metric | None:
        """The row of a metric; None if it was not recorded."""
        wanted = (of, which.get("over"), which.get("by"))
        found = self.every(metric, which.get("asset"), which.get("split", "test"))
        return next((each for each in found if (each.of, each.over, each.by) == wanted), None)

    def value(self, metric: MetricName, of: str | None = None, **which: Unpack[Which]) -> float | None:
        """The value of a metric; None if it was not recorded or could not be measured."""
        found = self.find(metric, of, **which)
        return found.value if found else None

    def every(self, metric: MetricName, asset: str | None = None, split: str = "test") -> list[Metric]:
        """All rows of a metric on a split or on none, in the order in which they were recorded."""
        return [
            each
            for recorded_by, each in self._by_name.get(metric, ())
            if each.split in (None, split) and asset in (None, recorded_by)
        ]

    @functools.cached_property
    def _by_name(self) -> dict[str, list[tuple[str, Metric]]]:
        """The rows of each metric, with the asset that recorded it: a report asks for thousands."""
        found: dict[str, list[tuple[str, Metric]]] = {}
        for asset, each in zip(self.frame["asset"], _as_metrics(self.frame), strict=True):
            found.setdefault(each.metric, []).append((asset, each))
        return found

    def without_rates_by(self, judge: str) -> "Metrics":
        """The same without the win rates of a judge that cannot judge; its counts of wins and losses stay."""
        of_judge = (pl.col("by") == judge) & pl.col("metric").str.contains("win_rate")
        shown = (pl.when(of_judge).then(None).otherwise(pl.col(name)).alias(name) for name in ("value", "low", "high"))
        return Metrics(self.frame.with_columns(shown))

    def without(self, asset: str) -> "Metrics":
        """The same without what an asset measured."""
        return Metrics(self.frame.filter(pl.col("asset") != asset))

    @property
    def of_its_candidate(self) -> "Metrics":
        """The same without what assets measured of an earlier M_t than the one that was evaluated, or of its control."""
        of_another = self.frame.filter(pl.col("of") == "candidate", pl.col("checkpoint_sha") != self.candidate)
        kept = self.frame.filter(~pl.col("asset").is_in(of_another["asset"].implode()))
        if EQUAL_STEPS in of_another["over"]:
            kept = kept.filter(pl.col("of").ne_missing(EQUAL_STEPS))
        return Metrics(kept)

    def with_metrics_of(self, asset: str, partition: str, metrics: Iterable[Metric]) -> "Metrics":
        """The same with metrics of an asset in place of what it measured before."""
        return Metrics(pl.concat([self.without(asset).frame, _rows(asset, partition, metrics)]))

    @property
    def candidate(self) -> str | None:
        """Sha of the M_t that was evaluated; None if none was."""
        evaluated = self.find("mean_repetition", "candidate", asset="evaluation")
        return evaluated.checkpoint_sha if evaluated else None

    @property
    def promoted(self) -> bool | None:
        """Whether the gate let this M_t enter the next iteration; None if it judged another one, or none yet."""
        judged = self.find("promoted", "candidate")
        return bool(judged.value) if judged and judged.checkpoint_sha == self.candidate else None

    @property
    def assets(self) -> set[str]:
        """The assets that have recorded something."""
        return set(self.frame["asset"])

    def assets_with(self, metric: MetricName) -> set[str]:
        """The assets that have recorded a metric of theirs as a whole."""
        return set(self.frame.filter(pl.col("of").is_null(), metric=metric)["asset"])


def record(store: ParquetTables, asset: str, partition: str | None, metrics: Iterable[Metric]) -> None:
    """Writes the metrics of an asset and iteration, in place of earlier ones."""
    store.write(asset, partition or ONCE, MetricRows.validate(_rows(asset, partition, metrics)))


def recorded(store: ParquetTables, partition: str | None) -> Metrics:
    """All that the assets of an iteration (None: those made once) have measured."""
    rows = pl.concat([pl.DataFrame(schema=SCHEMA), *store.of_partition(partition or ONCE)])
    # Earlier versions kept the rate, without an interval, where it is extrapolated.
    extrapolated = (pl.col("metric") == "length_controlled_win_rate") & pl.col("low").is_null()
    return Metrics(rows.with_columns(value=pl.when(~extrapolated).then("value")))


def judge_doubt(store: ParquetTables) -> str | None:
    """Why the independent judge's win rates say nothing, as a sentence; None if it can judge, or was never tried."""
    found = recorded(store, None).find("held_out_accuracy", BOTH_ENDED, asset="judge_model")
    return doubt(found.value, found.low, found.high, found.n) if found else None


# What an asset cost: of interest after what came out of it.
WORK: frozenset[MetricName] = frozenset({
    "input_tokens", "output_tokens", "reused_completions", "generation_seconds", "generated_tokens",
    "generated_tokens_per_second", "trained_tokens", "training_seconds", "trained_tokens_per_second", "readings", "reused_readings",
    "scored_tokens", "prompts_unread", "answers_unread", "scoring_seconds", "scored_tokens_per_second", "embedded_texts",
    "embedded_tokens", "texts_unread", "embedding_seconds", "peak_memory_gb", "peak_gpu_memory_gb",
})  # fmt: skip


def by_split(frame: pl.DataFrame, measure: Callable[[pl.DataFrame], Iterable[Metric]]) -> list[Metric]:
    """What is measured of the rows of each split, test first."""
    return [
        dataclasses.replace(metric, split=split)
        for split in sorted(HELD_OUT, reverse=True)
        if not (rows := frame.filter(split=split)).is_empty()
        for metric in measure(rows)
    ]


def generating(*usages: Usage) -> list[Metric]:
    """What generating cost, over one call or several."""
    usage = functools.reduce(operator.add, usages)
    return [
        Metric("generated_tokens", usage.generated_tokens),
        Metric("input_tokens", usage.input_tokens),
        Metric("output_tokens", usage.output_tokens),
        Metric("reused_completions", usage.reused, n=usage.rows),
        Metric("cut_share", usage.cut / usage.rows if usage.rows else None, n=usage.rows),
        *([Metric("refused_prompts", usage.refused, n=usage.rows)] if usage.refused else ()),
        Metric("generation_seconds", round(usage.seconds, 1)),
        *_rate("generated_tokens_per_second", usage.generated_tokens, usage.seconds),
    ]


def training(summary: TrainingSummary) -> list[Metric]:
    """What a training run did and cost."""
    surviving = summary.surviving
    return [
        Metric("examples", summary.examples),
        Metric("dropped_examples", summary.dropped),
        Metric("truncated_examples", summary.truncated),
        Metric("trained_tokens", summary.tokens),
        Metric("training_steps", summary.steps),
        Metric("training_seconds", round(summary.seconds, 1)),
        *_rate("trained_tokens_per_second", summary.tokens, summary.seconds),
        Metric("final_loss", [entry["loss"] for entry in summary.history if "loss" in entry][-1]),
        Metric("surviving_update", surviving.share if surviving else None),
        Metric("changed_weights", surviving.changed_weights if surviving else None),
    ]


def scoring(*usages: ScoringUsage) -> list[Metric]:
    """What scoring or judging cost, over one call or several."""
    usage = functools.reduce(operator.add, usages)
    return [
        Metric("readings", usage.readings),
        Metric("reused_readings", usage.reused),
        Metric("scored_tokens", usage.tokens),
        Metric("prompts_unread", usage.prompts_cut),
        Metric("answers_unread", usage.answers_cut),
        Metric("scoring_seconds", round(usage.seconds, 1)),
        *(_rate("scored_tokens_per_second", usage.tokens, usage.seconds) if not usage.reused else []),
    ]


def reading(found: Collection[Likelihoods]) -> list[Metric]:
    """What it cost to ask models how likely they find answers."""
    return [
        Metric("scored_tokens", sum(each.tokens for each in found)),
        Metric("scoring_seconds", round(sum(each.seconds for each in found), 1)),
    ]


def embedding(embedded: Embedded) -> list[Metric]:
    """What embedding cost."""
    return [
        Metric("embedded_texts", len(embedded.vectors)),
        Metric("embedded_tokens", embedded.tokens),
        Metric("texts_unread", embedded.texts_cut),
        Metric("embedding_seconds", round(embedded.seconds, 1)),
    ]


def mean(values: pl.Series) -> float | None:
    """The mean of numbers, or the share of truths; None without any."""
    found = values.mean()
    return float(found) if isinstance(found, int | float) else None


def ends(row: Mapping[str, Any], column: str) -> dict[str, Any]:
    """The ends of the interval of a column of a row, which stand in columns of their own beside it."""
    return {end: row[f"{column}_{end}"] for end in ("low", "high")}


def share(metric: MetricName, true: pl.Series, of: str) -> Metric:
    """The share of truths, with its score interval."""
    low, high = share_interval(true.to_list()) or (None, None)
    return Metric(metric, mean(true), of=of, low=low, high=high, n=len(true))


def with_rules(prompts: pl.DataFrame) -> list[Metric]:
    """How many prompts have rules; nothing where none has."""
    count = int(has_rules(prompts).sum())
    return [Metric("with_rules", count, n=prompts.height)] if count else []


def _rate(metric: MetricName, tokens: int, seconds: float) -> list[Metric]:
    return [Metric(metric, round(tokens / seconds, 1))] if tokens else []


def _rows(asset: str, partition: str | None, metrics: Iterable[Metric]) -> pl.DataFrame:
    about = {"asset": asset, "iteration": None if partition is None else int(partition)}
    return pl.DataFrame([about | dataclasses.asdict(metric) for metric in metrics], schema=SCHEMA)


def _as_metrics(rows: pl.DataFrame) -> Iterator[Metric]:
    for row in rows.drop("asset", "iteration").iter_rows(named=True):
        yield Metric(**row)
