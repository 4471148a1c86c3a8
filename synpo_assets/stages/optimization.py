"""Preference optimization: M_t.

Paper (section 2.3, algorithm 1 line 5): SimPO on all pairs of iterations 1 to t, starting from M_0.
Here: the same. The printed loss suggests a start from M_{t-1}; `preference_optimization.policy_init` chooses, and
`preference_optimization.accumulate: false` leaves the earlier pairs out. Batch size, epochs, learning rate and lengths are
not given in the paper; the presets take those of SimPO's own base-model runs.
"""

import dagster as dg
import polars as pl

from resources.storage.checkpoint_store import Checkpoint
from resources.training.losses import loss_module
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
    code=lambda settings: [loss_module(settings.preference_optimization.loss.kind).trainer],
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
    settings = services.settings
    options = settings.preference_optimization
    start = initial_policy if options.policy_init == "initial" else policy
    pairs = pl.concat([preference_history, preference_pairs]) if options.accumulate else preference_pairs
    rows = pairs.select(*USED_COLUMNS).to_dicts()
    made, summary = services.checkpoints.create(
        context,
        lambda directory: services.trainer.train("preference", start, rows, options.training, directory, options.loss),
        parents={"start": start, "policy": policy},
        trained_on={
            f"preference_pairs[{partition_key(number)}]": table_version(of_iteration)
            for (number,), of_iteration in pairs.group_by("iteration", maintain_order=True)
        },
        settings={
            "preference_optimization": options.model_dump(),
            "experiment": experiment_of(context.instance, initial_policy, settings),
        },
        random_seed=settings.random_seed,
    )
    counts = pairs.group_by("iteration").len().sort("iteration")
    partitions = [("preference_pairs", partition_key(number)) for number in counts["iteration"]]
    measured = [
        *(Metric("pairs_of_iteration", count, of=partition_key(number)) for number, count in counts.iter_rows()),
        *metrics.training(summary),
    ]
    return checkpoint_output(
        context,
        services,
        made,
        measured,
        next=next_policy(context),
        trained_on=versions_table(context.instance, partitions, pairs=counts["len"].to_list()),
        **training_log(summary),
    )
