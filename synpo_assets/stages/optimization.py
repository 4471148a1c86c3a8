"""Preference optimization: M_t.

Paper (section 2.3, algorithm 1 line 5): SimPO on all pairs of iterations 1 to t, starting from M_0.
Here: the same. The printed loss suggests a start from M_{t-1}; `preference_optimization.policy_init` chooses, and
`preference_optimization.accumulate: false` leaves the earlier pairs out. Batch size, epochs, learning rate and lengths are
not given in the paper; the presets take those of SimPO's own base-model runs.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from resources.settings.method import PreferenceOptimization
from resources.settings.settings import Settings
from resources.storage.checkpoint_store import Checkpoint
from resources.storage.files import link_or_copy
from resources.training.job import TrainingSummary
from resources.training.losses import loss_module
from resources.training.trainer import Trainer
from synpo_assets.graph import metrics
from synpo_assets.graph.cost import Sizes, Work, training_work
from synpo_assets.graph.metrics import Metric
from synpo_assets.graph.partitions import partition_key
from synpo_assets.graph.presentation import checkpoint_output, table_version, training_log, versions_table
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import Stage
from synpo_assets.stages.loop import experiment_of, next_policy

USED_COLUMNS = ("iteration", "prompt", "chosen", "rejected", "chosen_finish_reason", "rejected_finish_reason")
# What decides a training on pairs.
TRAINING_READS = tuple(f"preference_optimization.{name}" for name in ("policy_init", "accumulate", "loss", "training"))


def loss_code(settings: Settings) -> list[Callable[..., Any]]:
    """What the loss of the settings trains with, which no stage calls by its name."""
    return [loss_module(settings.preference_optimization.loss.kind).trainer]


def optimization_cost(sizes: Sizes) -> list[Work]:
    """The training of M_t, as long as its pairs."""
    options, length = sizes.settings.preference_optimization, 2 * (sizes.asked + sizes.written)
    pairs = sizes.settings.preferences.pairs_per_iteration
    return [training_work(options.training, pairs, length, accumulates=options.accumulate)]


@Stage(
    group="optimization",
    checkpoint=True,
    work=("trains",),
    reads=TRAINING_READS,
    cost=optimization_cost,
    code=loss_code,
)
def model_checkpoint(
    context: dg.AssetExecutionContext,
    preference_pairs: pl.DataFrame,
    preference_history: pl.DataFrame,
    initial_policy: Checkpoint,
    policy: Checkpoint,
    services: dg.ResourceParam[Services],
) -> dg.Output[Checkpoint]:
    """M_t: preference optimization on all pairs so far, starting from M_0 (algorithm 1, line 5).

    Look at `curves`: loss falls, reward accuracy rises, and the margin grows without running away. `trained_on` links to its
    pairs, `read_by` to what measures it and what it writes next. Whether it is better is in `evaluation`.
    """
    options = services.settings.preference_optimization
    pairs = pairs_of(options, preference_pairs, preference_history)
    made, summary = optimized(context, services, options, (initial_policy, policy), pairs)
    return optimized_output(context, services, made, metrics.training(summary), summary, pairs)


def pairs_of(
    options: PreferenceOptimization, preference_pairs: pl.DataFrame, preference_history: pl.DataFrame
) -> pl.DataFrame:
    """The pairs that M_t is trained on: D of algorithm 1."""
    return pl.concat([preference_history, preference_pairs]) if options.accumulate else preference_pairs


def versions_of(pairs: pl.DataFrame) -> dict[str, str]:
    """The content version of the pairs of each iteration, by the name of their table."""
    return {
        f"preference_pairs[{partition_key(number)}]": table_version(of_iteration)
        for (number,), of_iteration in pairs.group_by("iteration", maintain_order=True)
    }


def optimized(
    context: dg.AssetExecutionContext,
    services: Services,
    options: PreferenceOptimization,
    models: tuple[Checkpoint, Checkpoint],
    pairs: pl.DataFrame,
    trainer: Trainer | None = None,
    candidate: Checkpoint | None = None,
    **stated: Any,
) -> tuple[Checkpoint, TrainingSummary]:
    """A checkpoint that was trained on pairs as the options say, and how that went.

    Args:
        models: M_0 and the policy.
        trainer: Trains it in place of the trainer of all stages.
        candidate: It was trained before, as this one, whose files it takes.
        stated: What its manifest says besides.
    """
    initial_policy, policy = models
    start = initial_policy if options.policy_init == "initial" else policy

    def build(directory: Path) -> TrainingSummary:
        if candidate is not None:
            shutil.copytree(candidate.directory, directory, dirs_exist_ok=True, copy_function=link_or_copy)
            return TrainingSummary.kept(directory)
        rows = pairs.select(*USED_COLUMNS).to_dicts()
        train = (trainer or services.trainer).train
        summary = train("preference", start, rows, options.training, directory, options.loss)
        summary.keep(directory)
        return summary

    return services.checkpoints.create(
        context,
        build,
        parents={"start": start, "policy": policy, **({"candidate": candidate} if candidate else {})},
        trained_on=versions_of(pairs),
        settings={
            "preference_optimization": options.model_dump(),
            "experiment": experiment_of(context.instance, initial_policy, services.settings),
            **stated,
        },
        random_seed=services.settings.random_seed,
    )


def optimized_output(
    context: dg.AssetExecutionContext,
    services: Services,
    made: Checkpoint,
    training: Sequence[Metric],
    summary: TrainingSummary,
    pairs: pl.DataFrame,
    **shown: Any,
) -> dg.Output[Checkpoint]:
    """M_t with what it was trained on, how its training went, and what becomes of it."""
    counts = pairs.group_by("iteration").len().sort("iteration")
    partitions = [("preference_pairs", partition_key(number)) for number in counts["iteration"]]
    measured = [Metric("pairs_of_iteration", count, of=partition_key(number)) for number, count in counts.iter_rows()]
    return checkpoint_output(
        context,
        services,
        made,
        [*measured, *training],
        **shown,
        next=next_policy(context),
        trained_on=versions_table(
            context.instance, partitions, made.manifest["trained_on"], pairs=counts["len"].to_list()
        ),
        **training_log(summary),
    )
