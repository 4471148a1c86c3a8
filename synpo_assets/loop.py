"""The two back edges of the loop: M_t enters iteration t + 1, and so do all pairs made until then.

Paper (algorithm 1): M_{t-1} makes the data of iteration t, and all data so far makes M_t.
Here: Dagster refuses cycles between asset keys, so the edges that lead back are not declared but reported:
`model_checkpoint[t]` reports a materialization of `policy[t+1]`, and `preference_pairs[t]` one of
`preference_history[t+1]`. Both state assets look up what iteration t-1 left, wait while a live run is still making
it, and refuse if it is missing, failed or altered.
"""

import time
from typing import Any

import dagster as dg
import polars as pl

from resources.checkpoint_store import Checkpoint, CheckpointError, CheckpointStore
from resources.tables import ParquetTables
from synpo_assets.partitions import ITERATIONS, checkpoint, iteration_of, partition_key, table
from synpo_assets.presentation import checkpoint_output, made_by, table_output, table_version
from synpo_assets.schemas import PreferenceHistory

POLL_SECONDS = 2.0
LOG_EVERY_SECONDS = 30.0


@dg.asset(
    partitions_def=ITERATIONS,
    deps=["seed_pairs", "keyword_pool", "prompt_generator", "reward_model"],
    **checkpoint(),
)
def policy(
    context: dg.AssetExecutionContext, initial_policy: Checkpoint, checkpoints: dg.ResourceParam[CheckpointStore]
) -> dg.Output[Checkpoint]:
    """M_{t-1}, the model that enters iteration t: M_0 at first, then the checkpoint of the iteration before."""
    if iteration_of(context) == 1:
        entering = initial_policy
    else:
        previous = partition_key(iteration_of(context) - 1)
        wait_until_finished(context, "model_checkpoint", previous)
        entering = checkpoints.current("model_checkpoint", previous)
        checkpoints.verify(entering)
    return checkpoint_output(entering, **made_by(entering))


@dg.asset(partitions_def=ITERATIONS, deps=[policy], **table(PreferenceHistory))
def preference_history(
    context: dg.AssetExecutionContext, tables: dg.ResourceParam[ParquetTables]
) -> dg.Output[pl.DataFrame]:
    """The pairs of iterations 1 to t-1, which M_t is trained on beside those of iteration t (algorithm 1: D)."""
    earlier = [partition_key(number) for number in range(1, iteration_of(context))]
    for partition in earlier:
        wait_until_finished(context, "preference_pairs", partition)
    return _history([tables.read("preference_pairs", partition) for partition in earlier])


def report_policy(context: dg.AssetExecutionContext, made: Checkpoint, checkpoints: CheckpointStore) -> None:
    """Hands M_t, just made, to the next iteration: the back edge model_checkpoint[t] -> policy[t+1]."""
    following = partition_key(iteration_of(context) + 1)
    checkpoints.point_to("policy", following, made)
    _report(context, "policy", following, made.sha[:16], {**made_by(made), "sha": made.sha})


def report_history(
    context: dg.AssetExecutionContext, history: pl.DataFrame, pairs: pl.DataFrame, tables: ParquetTables
) -> None:
    """Adds the pairs, just made, to those before: the back edge preference_pairs[t] -> preference_history[t+1]."""
    following = partition_key(iteration_of(context) + 1)
    combined = pl.concat([history, pairs])
    tables.write("preference_history", following, combined)
    metadata = {"dagster/row_count": combined.height}
    _report(context, "preference_history", following, table_version(combined), metadata)


def wait_until_finished(context: dg.AssetExecutionContext, asset: str, partition: str) -> None:
    """Returns when the newest attempt to make an asset of an earlier iteration has succeeded; waits while it runs.

    Raises:
        CheckpointError: It was never made, or its newest attempt failed or was cancelled.
    """
    key, label = dg.AssetKey(asset), f"{asset}[{partition}]"
    reported = 0.0
    while True:
        made = context.instance.fetch_materializations(
            dg.AssetRecordsFilter(asset_key=key, asset_partitions=[partition]), limit=1
        ).records
        planned = context.instance.get_latest_planned_materialization_info(key, partition)
        if made and (planned is None or planned.storage_id < made[0].storage_id):
            return
        run = planned and context.instance.get_run_by_id(planned.run_id)
        if planned is None or run is None:
            raise CheckpointError(f"{label} was never materialized: run that iteration first.")
        if run.is_finished:
            raise CheckpointError(
                f"The newest attempt to make {label} ended without it (run {run.run_id}: {run.status.value}): "
                "run that iteration again, then this one."
            )
        if time.monotonic() - reported > LOG_EVERY_SECONDS:
            reported = time.monotonic()
            context.log.info(f"Waiting for {label}, which run {run.run_id} is making.")
        time.sleep(POLL_SECONDS)


def _report(
    context: dg.AssetExecutionContext, asset: str, partition: str, version: str, metadata: dict[str, Any]
) -> None:
    reporter = f"{context.asset_key.to_user_string()}[{context.partition_key}]"
    context.log_event(
        dg.AssetMaterialization(
            asset,
            partition=partition,
            description=f"Reported by {reporter}.",
            metadata={
                **metadata,
                "reported_by": reporter,
                "made_by_asset": dg.MetadataValue.asset(context.asset_key),
                "made_by_run": dg.MetadataValue.dagster_run(context.run.run_id),
            },
            tags={"dagster/data_version": version},
        )
    )


def _history(tables: list[pl.DataFrame]) -> dg.Output[pl.DataFrame]:
    empty = PreferenceHistory.empty()
    frame = pl.concat([empty, *tables]) if tables else empty
    counts = dict(frame.group_by("iteration").len().sort("iteration").iter_rows())
    return table_output(frame, pairs_by_iteration=dg.MetadataValue.json({str(key): n for key, n in counts.items()}))
