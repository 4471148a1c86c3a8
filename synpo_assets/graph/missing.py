"""Which assets are still to be made, and which were made with other settings."""

import dagster as dg
from dagster import DagsterInstance
from dagster._core.definitions.assets.graph.asset_graph import AssetGraph

from resources.common.text import asset_label
from synpo_assets.graph.checks import failed_checks, unfinished_checks
from synpo_assets.graph.history import metadata_of, newest, unfinished_attempt
from synpo_assets.graph.partitions import OPT_IN_TAG

CODE_VERSION_TAG = "dagster/code_version"
# They look up what the iteration before left, so they run whenever anything of their iteration does.
STATE_ASSETS = {"policy", "preference_history"}
# Made from all iterations, so it is made again at the end of each.
REPORT = "boosting_report"


def asset_names(graph: AssetGraph, partitioned: bool) -> list[str]:
    """Assets in dependency order: those of an iteration, or those made once, before all iterations.

    What is opt-in is neither: it is made only when it is asked for by name.
    """
    ordered = [graph.get(key) for keys in graph.toposorted_asset_keys_by_level for key in sorted(keys)]
    own = [node for node in ordered if OPT_IN_TAG not in node.tags]
    names = [node.key.to_user_string() for node in own if (node.partitions_def is not None) == partitioned]
    return [name for name in names if name != REPORT]


def missing_assets(instance: DagsterInstance, graph: AssetGraph, partition: str | None) -> list[str]:
    """The assets of an iteration (or, for None, those made once) to be made, in order; the report ends an iteration.

    An asset is missing if it was never materialized, if the newest attempt to make or check it has ended without a
    result, or if it failed a blocking check. So is a promotion that was refused under other limits than those of now.
    """
    names = asset_names(graph, partitioned=partition is not None)
    missing = {name for name in names if _is_missing(instance, name, partition)}
    missing |= {name for name in names if _is_to_be_judged_again(instance, graph, name, partition)}
    if partition is None:
        return [name for name in names if name in missing]
    return [*(name for name in names if name in missing | STATE_ASSETS), REPORT] if missing else []


def _is_missing(instance: DagsterInstance, name: str, partition: str | None) -> bool:
    if newest(instance, name, partition) is None or failed_checks(instance, name, partition):
        return True
    run_id = unfinished_attempt(instance, name, partition) or unfinished_checks(instance, name, partition)
    run = instance.get_run_by_id(run_id) if run_id else None
    return run_id is not None and (run is None or run.is_finished)


def _is_to_be_judged_again(instance: DagsterInstance, graph: AssetGraph, name: str, partition: str | None) -> bool:
    """Whether the gate refused M_t before its limits were corrected: the same command again shall then go on."""
    refused = name == "promotion" and metadata_of(instance, name, partition).get("promoted") is False
    return refused and _is_outdated(instance, graph, name, partition)


def _is_outdated(instance: DagsterInstance, graph: AssetGraph, name: str, partition: str | None) -> bool:
    record = newest(instance, name, partition)
    made = record and record.asset_materialization
    version = (made.tags or {}).get(CODE_VERSION_TAG) if made else None
    return bool(version) and version != graph.get(dg.AssetKey(name)).code_version


def outdated_assets(instance: DagsterInstance, graph: AssetGraph) -> list[str]:
    """The assets, by iteration, that were made with another code version than that of now and are not made again by themselves."""
    outdated = []
    for name in asset_names(graph, partitioned=False) + asset_names(graph, partitioned=True):
        made_for: list[str | None] = [*sorted(instance.get_materialized_partitions(dg.AssetKey(name)))]
        outdated += [
            asset_label(name, partition)
            for partition in made_for or [None]
            if _is_outdated(instance, graph, name, partition)
            and not _is_to_be_judged_again(instance, graph, name, partition)
        ]
    return outdated
