"""What Dagster's event log knows about an asset: its newest materialization, metadata, run and time."""

from typing import Any

import dagster as dg
from dagster import DagsterInstance


def newest(instance: DagsterInstance, asset: str, partition: str | None) -> dg.EventLogRecord | None:
    """The newest materialization of an asset and iteration (None for assets made once), or None if there is none.

    A state asset may have been reported by another run as well; the newest event is the one that counts.
    """
    selection = dg.AssetRecordsFilter(
        asset_key=dg.AssetKey(asset), asset_partitions=None if partition is None else [partition]
    )
    records = instance.fetch_materializations(selection, limit=1).records
    return records[0] if records else None


def metadata_of(instance: DagsterInstance, asset: str, partition: str | None) -> dict[str, Any]:
    """The metadata values of the newest materialization; empty if there is none."""
    record = newest(instance, asset, partition)
    made = record and record.asset_materialization
    return {name: entry.value for name, entry in made.metadata.items()} if made else {}


def data_version(record: dg.EventLogRecord | None) -> str | None:
    """The content version of a materialization; None if there is none."""
    made = record and record.asset_materialization
    return (made.tags or {}).get("dagster/data_version") if made else None


def data_version_of(instance: DagsterInstance, asset: str, partition: str | None) -> str | None:
    """The content version of the newest materialization; None if there is none."""
    return data_version(newest(instance, asset, partition))


def input_version_of(instance: DagsterInstance, asset: str, partition: str | None, read: str) -> str | None:
    """What stands for the version that the newest materialization read of another asset; None if that is not known.

    Dagster records a hash of the content version where that asset has iterations: compare these with each other alone.
    """
    record = newest(instance, asset, partition)
    made = record and record.asset_materialization
    return (made.tags or {}).get(f"dagster/input_data_version/{read}") if made else None


def unfinished_attempt(instance: DagsterInstance, asset: str, partition: str | None) -> str | None:
    """The run that was last to start on an asset and has not made it (yet); None if the newest attempt succeeded."""
    planned = instance.get_latest_planned_materialization_info(dg.AssetKey(asset), partition)
    record = newest(instance, asset, partition)
    if planned is None or (record is not None and planned.storage_id < record.storage_id):
        return None
    return planned.run_id


def seconds_of(instance: DagsterInstance, asset: str, partition: str | None) -> float:
    """Wall time of the step that made the newest materialization, in seconds; 0 if it was reported by another asset."""
    record = newest(instance, asset, partition)
    for stats in instance.get_run_step_stats(record.run_id, step_keys=[asset]) if record else []:
        if stats.start_time and stats.end_time:
            return stats.end_time - stats.start_time
    return 0.0
