"""Asset checks: blocking where going on would waste a GPU, warnings where people should look.

Paper: none; it watches AlpacaEval between iterations. Here: the schema of a table is checked before it is written
(schemas.py); these checks judge what was written, per iteration, each time it is materialized. Thresholds are the section
`checks` of the settings. A blocking check that failed ends its iteration, and the next one refuses to start.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
from dagster import DagsterInstance
from dagster._core.event_api import PartitionKeyFilter
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecord
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecordStatus as CheckStatus

from resources.models.weights import tensors_not_finite
from resources.settings.files import active_settings
from resources.settings.settings import Settings
from resources.storage.checkpoint_store import CheckpointStore
from resources.storage.tables import ParquetTables
from synpo_assets.graph.history import metadata_of
from synpo_assets.graph.partitions import ITERATIONS, partition_key
from synpo_assets.method.evaluation import win_rate
from synpo_assets.method.quality import length_ratio, mean_repetition, mean_similarity

# Partitions of asset checks are marked preview; the pinned Dagster minor version is the one they were tested with.
warnings.filterwarnings("ignore", category=dg.PreviewWarning)

BLOCKING = {
    "preference_pairs": ("enough_pairs", "no_empty_side"),
    "prompt_generator": ("finite_weights",),
    "reward_model": ("finite_weights",),
    "judge_model": ("finite_weights",),
    "response_improver": ("finite_weights",),
    "model_checkpoint": ("finite_weights",),
}
MADE_ONCE = ("prompt_generator", "reward_model", "judge_model")


def failed_checks(instance: DagsterInstance, asset: str, partition: str | None) -> list[str]:
    """The blocking checks of an asset and iteration that failed when they were last evaluated."""
    return [name for name, record in _latest(instance, asset, partition) if record.status == CheckStatus.FAILED]


def unfinished_checks(instance: DagsterInstance, asset: str, partition: str | None) -> str | None:
    """The run that was last to start on a blocking check and has not evaluated it (yet); None if there is none."""
    latest = _latest(instance, asset, partition)
    return next((record.run_id for _, record in latest if record.status == CheckStatus.PLANNED), None)


def _latest(
    instance: DagsterInstance, asset: str, partition: str | None
) -> list[tuple[str, AssetCheckExecutionRecord]]:
    keys = [dg.AssetCheckKey(dg.AssetKey(asset), name) for name in BLOCKING.get(asset, ())]
    latest = instance.event_log_storage.get_latest_asset_check_execution_by_key(
        keys, partition_filter=PartitionKeyFilter(key=partition)
    )
    return [(key.name, record) for key, record in latest.items()]


def _spec(name: str, asset: str, description: str) -> dg.AssetCheckSpec:
    return dg.AssetCheckSpec(
        name,
        asset=asset,
        description=description,
        blocking=name in BLOCKING.get(asset, ()),
        partitions_def=None if asset in MADE_ONCE else ITERATIONS,
    )


def _result(context: dg.AssetCheckExecutionContext, name: str, passed: bool, **figures: Any) -> dg.AssetCheckResult:
    asset = context.check_specs[0].asset_key.to_user_string()
    severity = dg.AssetCheckSeverity.ERROR if name in BLOCKING.get(asset, ()) else dg.AssetCheckSeverity.WARN
    return dg.AssetCheckResult(check_name=name, passed=bool(passed), severity=severity, metadata=figures)


@dg.multi_asset_check(
    specs=[
        _spec("few_near_duplicates", "synthetic_prompts", "Share of written prompts that repeat an earlier one."),
        _spec("varied_prompts", "synthetic_prompts", "Likeness of two prompts, compared with iteration 1."),
    ]
)
def synthetic_prompts_checks(
    context: dg.AssetCheckExecutionContext,
    tables: dg.ResourceParam[ParquetTables],
    settings: dg.ResourceParam[Settings],
) -> Iterator[dg.AssetCheckResult]:
    """Whether the generator still writes new prompts."""
    limits = settings.checks
    about = metadata_of(context.instance, "synthetic_prompts", context.partition_key)
    # An event that was reported by hand has no figures.
    rate = about.get("dropped", {}).get("near_duplicate", 0) / about.get("keyword_sets_used", 1)
    yield _result(
        context, "few_near_duplicates", rate <= limits.max_near_duplicate_rate,
        near_duplicate_rate=rate, most_allowed=limits.max_near_duplicate_rate,
    )  # fmt: skip
    here, first = (
        mean_similarity(tables.read("synthetic_prompts", key)["prompt"].to_list(), settings.random_seed)
        for key in (context.partition_key, partition_key(1))
    )
    yield _result(
        context, "varied_prompts", here <= first * limits.max_similarity_growth,
        mean_similarity=here, in_iteration_1=first, most_allowed=first * limits.max_similarity_growth,
    )  # fmt: skip


@dg.multi_asset_check(
    specs=[
        _spec("enough_pairs", "preference_pairs", "Enough pairs to train on."),
        _spec(
            "no_empty_side", "preference_pairs", "A tripwire behind the filter: SimPO divides by an answer's length."
        ),
        _spec("score_margin", "preference_pairs", "Mean of score(chosen) - score(rejected)."),
        _spec(
            "length_ratio", "preference_pairs", "Characters of chosen over rejected answers: length is an easy reward."
        ),
        _spec("repetition", "preference_pairs", "Mean share of repeated word n-grams in chosen answers."),
    ]
)
def preference_pairs_checks(
    context: dg.AssetCheckExecutionContext,
    tables: dg.ResourceParam[ParquetTables],
    settings: dg.ResourceParam[Settings],
) -> Iterator[dg.AssetCheckResult]:
    """Whether the pairs are worth training on."""
    limits, options = settings.checks, settings.preferences
    pairs = tables.read("preference_pairs", context.partition_key)
    chosen, rejected = (_texts(pairs[side]) for side in ("chosen", "rejected"))
    least = limits.min_pairs_share * options.pairs_per_iteration
    yield _result(context, "enough_pairs", pairs.height >= least, pairs=pairs.height, least_allowed=least)
    empty = sum(not text.strip() for text in chosen + rejected)
    yield _result(context, "no_empty_side", empty == 0, empty_answers=empty)
    margin = sum(pairs["margin"]) / pairs.height
    yield _result(
        context, "score_margin", margin >= limits.min_mean_margin,
        mean_margin=margin, least_allowed=limits.min_mean_margin,
    )  # fmt: skip
    ratio, most = length_ratio(chosen, rejected), limits.max_length_ratio
    yield _result(
        context, "length_ratio", 1 / most <= ratio <= most,
        chosen_to_rejected_length=ratio, least_allowed=1 / most, most_allowed=most,
    )  # fmt: skip
    repeated = mean_repetition(chosen, options.repetition_ngram)
    yield _result(
        context, "repetition", repeated <= limits.max_mean_repetition,
        mean_repetition=repeated, most_allowed=limits.max_mean_repetition,
    )  # fmt: skip


@dg.multi_asset_check(
    specs=[
        _spec("win_rate", "evaluation", "Win rate of M_t over M_0 on held-out prompts, by the independent judge."),
        _spec("answers_without_loops", "evaluation", "Mean share of repeated word n-grams in M_t's answers."),
    ]
)
def evaluation_checks(
    context: dg.AssetCheckExecutionContext,
    tables: dg.ResourceParam[ParquetTables],
    settings: dg.ResourceParam[Settings],
) -> Iterator[dg.AssetCheckResult]:
    """Whether training moved the policy where it was meant to go."""
    limits = settings.checks
    answers = tables.read("evaluation", context.partition_key)
    wins, by_scorer = (win_rate(answers[f"{judge}_over_initial"]) for judge in ("judge", "scorer"))
    yield _result(
        context, "win_rate", wins is not None and wins >= limits.min_win_rate,
        win_rate=wins, by_the_scorer=by_scorer, least_allowed=limits.min_win_rate,
    )  # fmt: skip
    sides = [answers[f"{side}_response"].to_list() for side in ("policy", "initial")]
    repeated, before = (mean_repetition(texts, settings.preferences.repetition_ngram) for texts in sides)
    yield _result(
        context, "answers_without_loops", repeated <= limits.max_mean_repetition,
        mean_repetition=repeated, of_the_initial_policy=before, most_allowed=limits.max_mean_repetition,
    )  # fmt: skip


def _finite_weights(asset: str) -> dg.AssetChecksDefinition:
    @dg.multi_asset_check(
        name=f"{asset}_checks", specs=[_spec("finite_weights", asset, "No NaN and no infinity in the weights.")]
    )
    def check(
        context: dg.AssetCheckExecutionContext, checkpoints: dg.ResourceParam[CheckpointStore]
    ) -> Iterator[dg.AssetCheckResult]:
        made = checkpoints.current(asset, None if asset in MADE_ONCE else context.partition_key)
        broken = tensors_not_finite(Path(made.weights))
        yield _result(context, "finite_weights", not broken, tensors_not_finite=len(broken), sha=made.sha)

    return check


# A check of an asset that does not exist would draw that asset into the graph.
finite_weights_checks = [
    _finite_weights(asset)
    for asset, names in BLOCKING.items()
    if "finite_weights" in names and (asset != "response_improver" or active_settings().trains_improver)
]


def _texts(messages: pl.Series) -> list[str]:
    return [row[-1]["content"] for row in messages.to_list()]
