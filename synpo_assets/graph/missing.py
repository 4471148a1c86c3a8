"""Which assets are still to be made, and which were made with other settings."""

import contextlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import dagster as dg
import polars as pl
from dagster import DagsterInstance
from dagster._core.definitions.assets.graph.asset_graph import AssetGraph

from resources.common.errors import DamageError
from resources.common.text import asset_label
from synpo_assets.graph.history import (
    data_version_of,
    failed_checks,
    made_again,
    newest,
    tag_of,
    unfinished_attempt,
    unfinished_checks,
)
from synpo_assets.graph.metrics import EQUAL_STEPS, recorded
from synpo_assets.graph.presentation import table_version
from synpo_assets.graph.schemas import PairVerdicts
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import OPT_IN_TAG, STATE_TAG

PAIRS, VERDICTS = "preference_pairs", "pair_verdicts"
# What is measured, as metrics call it, and the checkpoint that it is.
MADE, CONTROL = "model_checkpoint", "equal_steps_checkpoint"
MEASURED = {"candidate": MADE, EQUAL_STEPS: CONTROL}


def asset_names(graph: AssetGraph, partitioned: bool) -> list[str]:
    """Assets in dependency order: those of an iteration, or those made once, before all iterations.

    What is opt-in is neither: it is made only when it is asked for by name.
    """
    ordered = [graph.get(key) for keys in graph.toposorted_asset_keys_by_level for key in sorted(keys)]
    own = [node for node in ordered if OPT_IN_TAG not in node.tags]
    return [node.key.to_user_string() for node in own if node.is_partitioned == partitioned]


def missing_assets(
    instance: DagsterInstance, services: Services, partition: str | None, damaged: Collection[str] = ()
) -> list[str]:
    """The assets of an iteration (or, for None, those made once) to be made, in order.

    An asset is missing if it was never materialized, if the newest attempt to make it has ended without a result, if it
    failed a blocking check, or if what was made is damaged. So is a promotion that was refused under other limits than those
    of now, the control of an M_t with other weights than those of now, and whatever measured either. So are verdicts of people
    whose file has changed, and pairs that were made with other verdicts than those of now, with all that is made from them; and
    what is made from pairs that were made again since M_t, or its control, was trained on them.
    """
    graph = services.graph
    names = asset_names(graph, partitioned=partition is not None)
    missing = {name for name in names if name in damaged or _is_missing(instance, graph, name, partition)}
    # What is damaged is made again first.
    with contextlib.suppress(DamageError):
        missing |= {name for name in names if _is_to_be_judged_again(instance, services, name, partition)}
        missing |= _of_other_weights(services, partition).intersection(names)
    if _has_other_verdicts(instance, services, partition):
        missing |= {PAIRS, *_made_from(graph, names, PAIRS)}
    with contextlib.suppress(DamageError):
        if _has_other_pairs(instance, services, MADE, partition):
            missing |= _made_from(graph, names, PAIRS)
        if CONTROL in names and _has_other_pairs(instance, services, CONTROL, partition):
            missing |= {CONTROL, *_made_from(graph, names, CONTROL)}
    if partition is None or not missing:
        return [name for name in names if name in missing]
    return [name for name in names if name in missing or STATE_TAG in graph.get(dg.AssetKey(name)).tags]


def missing_checks(
    instance: DagsterInstance, services: Services, partition: str | None, missing: Collection[str] = ()
) -> list[dg.AssetCheckKey]:
    """The checks of missing assets, and of those that are made but of which a blocking check was begun and never ended."""
    graph, names = services.graph, set(missing)
    for name in asset_names(graph, partitioned=partition is not None):
        if _has_ended(instance, unfinished_checks(instance, graph, name, partition)):
            names.add(name)
    return sorted((key for name in names for key in graph.get(dg.AssetKey(name)).check_keys), key=str)


def _is_missing(instance: DagsterInstance, graph: AssetGraph, name: str, partition: str | None) -> bool:
    if newest(instance, name, partition) is None or failed_checks(instance, graph, name, partition):
        return True
    return _has_ended(instance, unfinished_attempt(instance, name, partition))


def _has_ended(instance: DagsterInstance, run_id: str | None) -> bool:
    run = instance.get_run_by_id(run_id) if run_id else None
    return run_id is not None and (run is None or run.is_finished)


def _has_other_verdicts(instance: DagsterInstance, services: Services, partition: str | None) -> bool:
    """Whether the pairs of an iteration were made with other verdicts of people than those that are made now.

    What stood there when the pairs were made is found by order: of an input with iterations Dagster records a hash alone.
    """
    if partition is None or dg.AssetKey(VERDICTS) not in services.graph.materializable_asset_keys:
        return False
    made = newest(instance, PAIRS, partition)
    if made is None:
        return False
    read = tag_of(instance, VERDICTS, partition, "data_version", before=made.storage_id)
    nothing = table_version(PairVerdicts.empty())
    return (data_version_of(instance, VERDICTS, partition) or nothing) != (read or nothing)


def _has_other_pairs(instance: DagsterInstance, services: Services, name: str, partition: str | None) -> bool:
    """Whether M_t, or its control, was trained on other pairs, of whatever iteration, than those that there are now."""
    made = services.checkpoints.manifest(name, partition) if partition else None
    return made is not None and bool(made_again(instance, made["trained_on"]))


def _made_from(graph: AssetGraph, names: Sequence[str], asset: str) -> set[str]:
    """What of an iteration, in order, is made from an asset of it."""
    renewed = {asset}
    for name in names:
        if any(key.to_user_string() in renewed for key in graph.get(dg.AssetKey(name)).parent_keys):
            renewed.add(name)
    return renewed - {asset}


def _is_to_be_judged_again(instance: DagsterInstance, services: Services, name: str, partition: str | None) -> bool:
    """True if the gate rejected M_t under limits that have changed since, or if the file of verdicts has changed."""
    if name == VERDICTS:
        return _is_outdated(instance, services.graph, name, partition)
    if name != "promotion":
        return False
    judged = recorded(services.metrics, partition).find("promoted", "candidate")
    return judged is not None and not judged.value and _is_outdated(instance, services.graph, name, partition)


def _of_other_weights(services: Services, partition: str | None) -> set[str]:
    """What measured an M_t, or its control, which was trained again since, to other weights; and the control of such an M_t."""
    if partition is None:
        return set()
    manifests = {name: services.checkpoints.manifest(name, partition) for name in MEASURED.values()}
    shas = {name: manifest["sha"] for name, manifest in manifests.items() if manifest}
    measured = recorded(services.metrics, partition).frame
    found = {
        asset
        for side, name in MEASURED.items()
        if name in shas
        for asset in measured.filter(pl.col("of") == side, pl.col("checkpoint_sha") != shas[name])["asset"]
    }
    if (control := manifests[CONTROL]) and MADE in shas and controlled_sha(control) != shas[MADE]:
        # The control may come out as it was, and was compared with another M_t nevertheless.
        found |= {CONTROL, *measured.filter(of=EQUAL_STEPS)["asset"]}
    return found


def controlled_sha(control: Mapping[str, Any]) -> str:
    """The sha of the M_t that a control was made for, by the control's manifest; M_1 is its own control."""
    return control["parents"].get("control of", control)["sha"]


def _is_outdated(instance: DagsterInstance, graph: AssetGraph, name: str, partition: str | None) -> bool:
    version = tag_of(instance, name, partition, "code_version")
    return bool(version) and version != graph.get(dg.AssetKey(name)).code_version


def outdated_assets(instance: DagsterInstance, services: Services) -> list[str]:
    """The assets, by iteration, that were made by other code or settings than those of now and are kept."""
    outdated = []
    for name in asset_names(services.graph, partitioned=False) + asset_names(services.graph, partitioned=True):
        made_for: list[str | None] = [*sorted(instance.get_materialized_partitions(dg.AssetKey(name)))]
        outdated += [
            asset_label(name, partition)
            for partition in made_for or [None]
            if _is_outdated(instance, services.graph, name, partition)
            and not _is_to_be_judged_again(instance, services, name, partition)
        ]
    return outdated
