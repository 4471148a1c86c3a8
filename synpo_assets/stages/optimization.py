"""Preference optimisation: M_t.

Paper (section 2.3, algorithm 1 line 5): SimPO on all pairs of iterations 1 to t, starting from M_0.
Here: the same. The printed loss suggests a start from M_{t-1}; `policy.policy_init` chooses, and
`policy.accumulate: false` leaves the earlier pairs out. Batch size, epochs,
learning rate and lengths are not given in the paper; the presets take those of SimPO's own base-model runs.
"""

import dagster as dg
import polars as pl

from resources.settings.settings import Settings
from resources.storage.checkpoint_store import Checkpoint, CheckpointStore
from resources.training.trainer import Trainer
from synpo_assets.graph.partitions import GPU_POOL, ITERATIONS, checkpoint, partition_key
from synpo_assets.graph.presentation import checkpoint_output, table_version, training_metadata, versions_table
from synpo_assets.stages.loop import experiment_of

USED_COLUMNS = ("iteration", "prompt", "chosen", "rejected", "chosen_finish_reason", "rejected_finish_reason")


@dg.asset(partitions_def=ITERATIONS, **checkpoint("policy", "engine.dtype"), pool=GPU_POOL, kinds={"huggingface"})
def model_checkpoint(
    context: dg.AssetExecutionContext,
    preference_pairs: pl.DataFrame,
    preference_history: pl.DataFrame,
    initial_policy: Checkpoint,
    policy: Checkpoint,
    trainer: Trainer,
    checkpoints: dg.ResourceParam[CheckpointStore],
    settings: dg.ResourceParam[Settings],
) -> dg.Output[Checkpoint]:
    """M_t: preference optimisation on all pairs so far, starting from M_0 (algorithm 1, line 5)."""
    training = settings.policy.training
    start = initial_policy if settings.policy.policy_init == "initial" else policy
    pairs = pl.concat([preference_history, preference_pairs]) if settings.policy.accumulate else preference_pairs
    rows = pairs.select(*USED_COLUMNS).to_dicts()
    made, summary = checkpoints.create(
        context,
        lambda directory: trainer.preference(start, rows, training, directory, context.log.info),
        parents={"start": start, "policy": policy},
        trained_on={
            f"preference_pairs[{partition_key(number)}]": table_version(of_iteration)
            for (number,), of_iteration in pairs.group_by("iteration", maintain_order=True)
        },
        settings={
            "policy": settings.policy.model_dump(),
            "experiment": experiment_of(context.instance, initial_policy, settings),
        },
        random_seed=settings.random_seed,
    )
    counts = pairs.group_by("iteration").len().sort("iteration")
    partitions = [("preference_pairs", partition_key(number)) for number in counts["iteration"]]
    return checkpoint_output(
        context,
        made,
        pairs_by_iteration=dg.MetadataValue.json({str(number): count for number, count in counts.iter_rows()}),
        trained_on=versions_table(context.instance, partitions, pairs=counts["len"].to_list()),
        **training_metadata(summary),
    )
