"""The two back edges of the loop: M_t enters iteration t + 1, and so do all pairs made until then.

Paper (algorithm 1): M_{t-1} makes the data of iteration t, and all data so far makes M_t.
Here: Dagster refuses cycles between asset keys, so the edges that lead back are not declared but reported:
`promotion[t]` reports a materialization of `policy[t+1]` once M_t has passed the gate, and `preference_pairs[t]` one of
`preference_history[t+1]`. Both state assets look up what earlier iterations left, wait while a live run is still making
it, and refuse if it is missing, failed or altered; `policy` also if it was not promoted.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import dagster as dg
import polars as pl
from dagster import DagsterInstance, DagsterRunStatus, RunsFilter
from dagster._core.definitions.data_version import DATA_VERSION_TAG
from dagster._core.storage.tags import PARTITION_NAME_TAG

from resources.common.text import asset_label
from resources.settings.settings import Settings
from resources.storage.checkpoint_store import Checkpoint, CheckpointError
from synpo_assets.graph.history import data_version_of, failed_checks, newest, unfinished_attempt, unfinished_checks
from synpo_assets.graph.metrics import Metric, recorded
from synpo_assets.graph.partitions import iteration_of, partition_key
from synpo_assets.graph.presentation import asset_link, checkpoint_output, made_by, table_output, table_version
from synpo_assets.graph.schemas import PreferenceHistory
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import Stage
from synpo_assets.method.gate import verdict

POLL_SECONDS = 2.0
LOG_EVERY_SECONDS = 30.0


@Stage(group="loop", checkpoint=True, state=True)
def policy(
    context: dg.AssetExecutionContext, initial_policy: Checkpoint, services: dg.ResourceParam[Services]
) -> dg.Output[Checkpoint]:
    """M_{t-1}, the model that enters iteration t: M_0 at first, then the promoted checkpoint of the iteration before.

    The model that writes in this iteration; `read_by` links to what it writes. It refuses a checkpoint that is missing, altered
    or not promoted, and says what to do.
    """
    wait_for_other_runs(context)
    entering = initial_policy
    if iteration_of(context) > 1:
        previous = partition_key(iteration_of(context) - 1)
        for asset in ("model_checkpoint", "promotion"):
            wait_until_finished(context, services, asset, previous)
        entering = services.checkpoints.current("model_checkpoint", previous)
        refuse_other_experiment(entering, experiment_of(context.instance, initial_policy, services.settings))
        refuse_unrecorded(entering, data_version_of(context.instance, "model_checkpoint", previous))
        if refusal := promotion_refusal(services, previous):
            raise CheckpointError(refusal)
    return checkpoint_output(context, services, entering, **made_by(entering))


@Stage(
    PreferenceHistory,
    group="loop",
    state=True,
    kinds=("polars",),
    # It reads nothing of the policy; with this arrow every asset of an iteration descends from `policy`.
    deps=("policy",),
    made_from={"pair_id": "preference_pairs"},
)
def preference_history(
    context: dg.AssetExecutionContext, services: dg.ResourceParam[Services]
) -> dg.Output[pl.DataFrame]:
    """The pairs of iterations 1 to t-1, which M_t is trained on together with those of iteration t (algorithm 1: D).

    Empty in iteration 1. The table says how many pairs come from each earlier iteration.
    """
    earlier = [partition_key(number) for number in range(1, iteration_of(context))]
    for partition in earlier:
        wait_until_finished(context, services, "preference_pairs", partition)
    empty = PreferenceHistory.empty()
    frame = pl.concat([empty, *(services.tables.read("preference_pairs", partition) for partition in earlier)])
    counts = frame.group_by("iteration").len().sort("iteration")
    measured = [Metric("pairs_of_iteration", count, of=partition_key(number)) for number, count in counts.iter_rows()]
    return table_output(context, services, frame, measured)


def report_policy(context: dg.AssetExecutionContext, services: Services, made: Checkpoint) -> None:
    """Announces M_t, just promoted, to the next iteration: the back edge promotion[t] -> policy[t+1].

    Only an event: what iteration t+1 reads changes when its own `policy` step runs, never under a run at work.
    """
    _report(context, services, "policy", made.sha[:16], {**made_by(made), "sha": made.sha})


def next_policy(context: dg.AssetExecutionContext) -> dg.MarkdownMetadataValue:
    """A link to what M_t becomes if it is promoted: the edge that Dagster does not draw."""
    following = partition_key(iteration_of(context) + 1)
    return dg.MetadataValue.md(
        f"{asset_link('policy', following)}, if M_t is promoted; its page links to what it writes"
    )


def report_history(
    context: dg.AssetExecutionContext, services: Services, history: pl.DataFrame, pairs: pl.DataFrame
) -> None:
    """Announces all pairs so far, those just made included: preference_pairs[t] -> preference_history[t+1]."""
    combined = pl.concat([history, pairs])
    _report(context, services, "preference_history", table_version(combined), {"dagster/row_count": combined.height})


def wait_until_finished(context: dg.AssetExecutionContext, services: Services, asset: str, partition: str) -> None:
    """Returns when the newest attempt to make an asset of an earlier iteration has succeeded; waits while it runs."""
    label = asset_label(asset, partition)

    def obstacle() -> str | None:
        run_id = unfinished_attempt(context.instance, asset, partition) or unfinished_checks(
            context.instance, services.graph, asset, partition
        )
        run = context.instance.get_run_by_id(run_id) if run_id else None
        if run_id and (run is None or run.is_finished):
            state = run.status.value if run else "deleted"
            raise CheckpointError(
                f"The newest attempt to make {label} ended without it (run {run_id}: {state}): run that iteration again, "
                "then this one."
            )
        return f"Waiting for {label}, which run {run_id} is making." if run_id else None

    _wait_out(context, obstacle)
    if newest(context.instance, asset, partition) is None:
        raise CheckpointError(f"{label} was never materialized: run that iteration first.")
    if failed := failed_checks(context.instance, services.graph, asset, partition):
        raise CheckpointError(
            f"{label} did not pass its blocking checks ({', '.join(failed)}): mend the cause, or correct the threshold "
            "(section `checks` of the settings), and run that iteration again."
        )


def experiment_of(instance: DagsterInstance, initial_policy: Checkpoint, settings: Settings) -> dict[str, str | int]:
    """What all iterations of one experiment share: M_0, the seed, and the random seed."""
    return {
        "initial_policy": initial_policy.sha[:16],
        "seed_pairs": str(data_version_of(instance, "seed_pairs", None)),
        "random_seed": settings.random_seed,
    }


def refuse_other_experiment(entering: Checkpoint, experiment: Mapping[str, str | int]) -> None:
    """Raises a sentence if a checkpoint was made from another M_0, another seed or another random seed.

    Sizes, thresholds and learning rates may change between iterations; these may not.
    """
    made_with = entering.manifest["settings"].get("experiment", {})
    differing = [
        f"{name} {made_with.get(name, 'unknown')} then, {value} now"
        for name, value in experiment.items()
        if made_with.get(name) != value
    ]
    if differing:
        raise CheckpointError(
            f"{entering.label} was made with other settings ({'; '.join(differing)}): run the iterations again from 0001, "
            "or give the new settings a home of their own."
        )


def refuse_unrecorded(entering: Checkpoint, recorded: str | None) -> None:
    """Raises a sentence if a checkpoint on disk is not the one that the history says was made."""
    if entering.sha[:16] != recorded:
        raise CheckpointError(
            f"{entering.directory} holds {entering.sha[:16]}, but the history of {entering.label} says {recorded}: the "
            f"directory was exchanged by hand. Materialize {entering.label} again."
        )


def promotion_refusal(services: Services, partition: str) -> str | None:
    """Why M_t, as it is now, must not enter the next iteration, as a sentence; None if it was promoted."""
    judged = recorded(services.metrics, partition).find("promoted", "candidate")
    evaluation, promotion, made = (
        asset_label(name, partition) for name in ("evaluation", "promotion", "model_checkpoint")
    )
    if judged is None:
        return f"{promotion} holds no verdict on {made}: materialize {promotion} first."
    sha = (services.checkpoints.manifest("model_checkpoint", partition) or {}).get("sha")
    if judged.checkpoint_sha != sha:
        return (
            f"{promotion} is about {str(judged.checkpoint_sha)[:16]}, but {made} is {str(sha)[:16]} by now: materialize "
            f"{evaluation} and {promotion} again."
        )
    if not judged.value:
        return (
            f"{promotion_verdict(services, partition)} Mend the cause and run that iteration again, or correct the limits in "
            f"the section `gate` of the settings and materialize {promotion} again."
        )
    return None


def promotion_verdict(services: Services, partition: str) -> str:
    """The sentence that says whether M_t became the policy of the next iteration, and why."""
    rows = services.tables.read("promotion", partition).to_dicts()
    following = partition_key(int(partition) + 1)
    return verdict(rows, asset_label("model_checkpoint", partition), asset_label("policy", following))


def wait_for_other_runs(context: dg.AssetExecutionContext) -> None:
    """Waits while an older run works on the same iteration, so that two never write the same partition at once.

    Runs from the UI queue for their iteration already (dagster.yaml); this covers runs that no queue has seen.
    """
    same_iteration = RunsFilter(
        statuses=[DagsterRunStatus.STARTING, DagsterRunStatus.STARTED, DagsterRunStatus.CANCELING],
        tags={PARTITION_NAME_TAG: context.partition_key},
    )

    def obstacle() -> str | None:
        # Newest first: the runs behind this one are older.
        live = [run.run_id for run in context.instance.get_runs(same_iteration)]
        older = live[live.index(context.run.run_id) + 1 :] if context.run.run_id in live else []
        if not older:
            return None
        return (
            f"Waiting for run {older[0]}, which works on iteration {context.partition_key} already. If its process is dead, "
            "terminate it in the UI."
        )

    _wait_out(context, obstacle)


def _wait_out(context: dg.AssetExecutionContext, obstacle: Callable[[], str | None]) -> None:
    """Asks again and again for what stands in the way, as a sentence, until nothing does; logs it now and then."""
    reported = 0.0
    while (sentence := obstacle()) is not None:
        if time.monotonic() - reported > LOG_EVERY_SECONDS:
            reported = time.monotonic()
            context.log.info(sentence)
        time.sleep(POLL_SECONDS)


def _report(
    context: dg.AssetExecutionContext, services: Services, asset: str, version: str, metadata: dict[str, Any]
) -> None:
    if iteration_of(context) == services.settings.max_iterations:
        return
    following = partition_key(iteration_of(context) + 1)
    reporter = f"{context.asset_key.to_user_string()}[{context.partition_key}]"
    context.log_event(
        dg.AssetMaterialization(
            asset,
            partition=following,
            description=f"Reported by {reporter}.",
            metadata={
                **metadata,
                "reported_by": reporter,
                "reported_by_asset": dg.MetadataValue.asset(context.asset_key),
                "reported_by_run": dg.MetadataValue.dagster_run(context.run.run_id),
            },
            tags={DATA_VERSION_TAG: version},
        )
    )
