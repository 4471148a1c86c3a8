"""What Dagster's event log knows about an asset: its newest materialization, its run and time, and its checks."""

import itertools
import time
from collections.abc import Iterator, Mapping

import dagster as dg
from dagster import DagsterInstance
from dagster._core.definitions.assets.graph.asset_graph import AssetGraph
from dagster._core.event_api import PartitionKeyFilter
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecord
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecordStatus as CheckStatus

from resources.common.text import labelled

# So many attempts are looked at, newest first; more in a row that never began are not expected.
CONSIDERED = 100


def newest(
    instance: DagsterInstance, asset: str, partition: str | None, before: int | None = None
) -> dg.EventLogRecord | None:
    """The newest materialization of an asset and iteration (None for assets made once), or None if there is none.

    A state asset may have been reported by another run as well; the newest event is the one that counts. `before` is the
    storage id of an event, of which only earlier ones are looked at.
    """
    selection = dg.AssetRecordsFilter(
        asset_key=dg.AssetKey(asset),
        asset_partitions=None if partition is None else [partition],
        before_storage_id=before,
    )
    records = instance.fetch_materializations(selection, limit=1).records
    return records[0] if records else None


def tag_of(
    instance: DagsterInstance, asset: str, partition: str | None, tag: str, before: int | None = None
) -> str | None:
    """A tag that Dagster gave the newest materialization, by its name after `dagster/`; None if there is none."""
    record = newest(instance, asset, partition, before)
    materialization = record and record.asset_materialization
    return (materialization.tags or {}).get(f"dagster/{tag}") if materialization else None


def data_version_of(instance: DagsterInstance, asset: str, partition: str | None) -> str | None:
    """The content version of the newest materialization; None if there is none."""
    return tag_of(instance, asset, partition, "data_version")


def input_version_of(instance: DagsterInstance, asset: str, partition: str | None, read: str) -> str | None:
    """What stands for the version that the newest materialization read of another asset; None if that is not known.

    Dagster records a hash of the content version where that asset has iterations: compare these with each other alone.
    """
    return tag_of(instance, asset, partition, f"input_data_version/{read}")


def made_again(instance: DagsterInstance, trained_on: Mapping[str, str]) -> dict[str, str]:
    """What was made again, to another version, since a checkpoint was trained on it: that version, by label."""
    versions = {label: data_version_of(instance, *labelled(label)) for label in trained_on}
    return {label: version for label, version in versions.items() if version not in (None, trained_on[label])}


def unfinished_attempt(instance: DagsterInstance, asset: str, partition: str | None) -> str | None:
    """The run that was last to start on an asset and has not made it (yet); None if the newest attempt succeeded."""
    record = newest(instance, asset, partition)
    since = dg.AssetRecordsFilter(
        asset_key=dg.AssetKey(asset),
        asset_partitions=None if partition is None else [partition],
        after_storage_id=record.storage_id if record else None,
    )
    planned = instance.fetch_planned_materializations(since, limit=CONSIDERED).records
    return next((each.run_id for each in planned if not never_began(instance, each.run_id)), None)


def never_began(instance: DagsterInstance, run_id: str) -> bool:
    """Whether a run ended before any of its steps started, such as one that was refused: it counts for nothing."""
    run = instance.get_run_by_id(run_id)
    if run is None or not run.is_finished or run.is_success:
        return False
    return not instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.STEP_START, limit=1).records


def seconds_of(instance: DagsterInstance, asset: str, partition: str | None) -> float:
    """Wall time of the step that made the newest materialization, in seconds; 0 if it was reported by another asset."""
    record = newest(instance, asset, partition)
    for stats in instance.get_run_step_stats(record.run_id, step_keys=[asset]) if record else []:
        if stats.start_time and stats.end_time:
            return stats.end_time - stats.start_time
    return 0.0


def seconds_so_far(context: dg.AssetExecutionContext) -> float:
    """How long the running step has been at work."""
    stats = context.instance.get_run_step_stats(context.run_id, step_keys=[context.asset_key.to_user_string()])
    return sum(time.time() - each.start_time for each in stats if each.start_time)


def failed_checks(instance: DagsterInstance, graph: AssetGraph, asset: str, partition: str | None) -> list[str]:
    """The blocking checks of an asset and iteration that failed when they were last evaluated."""
    latest = _latest_checks(instance, graph, asset, partition)
    return [name for name, record in latest if record.status == CheckStatus.FAILED]


def unfinished_checks(instance: DagsterInstance, graph: AssetGraph, asset: str, partition: str | None) -> str | None:
    """The run that was last to start on a blocking check and has not evaluated it (yet); None if there is none."""
    latest = _latest_checks(instance, graph, asset, partition)
    return next((record.run_id for _, record in latest if record.status == CheckStatus.PLANNED), None)


def _latest_checks(
    instance: DagsterInstance, graph: AssetGraph, asset: str, partition: str | None
) -> Iterator[tuple[str, AssetCheckExecutionRecord]]:
    for key in sorted(graph.get(dg.AssetKey(asset)).check_keys, key=str):
        if graph.get(key).blocking:
            records = instance.event_log_storage.get_asset_check_execution_history(
                key, limit=CONSIDERED, partition_filter=PartitionKeyFilter(key=partition)
            )
            # What a run evaluated, it has begun.
            counting = (
                each for each in records
                if each.status != CheckStatus.PLANNED or not never_began(instance, each.run_id)
            )  # fmt: skip
            yield from ((key.name, record) for record in itertools.islice(counting, 1))
