"""What was made and is gone or damaged since: `synpo run` makes it again."""

from collections.abc import Iterator

import dagster as dg
from dagster import DagsterInstance

from resources.common.errors import DamageError
from resources.common.text import asset_label
from resources.storage.manifests import ONCE
from synpo_assets.graph.history import data_version_of, newest
from synpo_assets.graph.missing import asset_names
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import LAST
from synpo_assets.reports import FOLDER, REPORT


def damaged_assets(instance: DagsterInstance, services: Services, partition: str | None) -> dict[str, str]:
    """What is wrong with the finished assets of an iteration (None: those made once), by asset.

    Tables are read again. Of checkpoints, whose weights each run reads again before it uses them, everything else is compared.
    """
    found = {}
    for name in made_assets(instance, services, partition):
        try:
            _look_at(services, name, partition, data_version_of(instance, name, partition))
        except DamageError as error:
            found[name] = error.problem
    return found


def made_assets(instance: DagsterInstance, services: Services, partition: str | None) -> Iterator[str]:
    """The finished assets of an iteration (None: those made once); what another asset has reported was not made yet."""
    for name in asset_names(services.graph, partitioned=partition is not None):
        record = newest(instance, name, partition)
        made = record and record.asset_materialization
        if made is not None and "reported_by" not in made.metadata:
            yield name


def _look_at(services: Services, name: str, partition: str | None, version: str | None) -> None:
    """Raises a DamageError if something that an asset keeps is gone or damaged."""
    node, label = services.graph.get(dg.AssetKey(name)), asset_label(name, partition)
    services.metrics.verify(name, partition or ONCE)
    services.used_settings.verify(name, partition or ONCE)
    if "dagster/column_schema" in node.metadata:
        services.tables.verify(name, partition)
    elif node.io_manager_key == "checkpoints":
        sha = services.checkpoints.current(name, partition).sha
        if sha[:16] != version:
            raise DamageError(f"The history of {label} says {version}, but its pointer names {sha[:16]}", label)
        services.checkpoints.training_log(name, partition)
    elif name == LAST and not (services.home / FOLDER / REPORT).is_file():
        raise DamageError(f"The report {services.home / FOLDER / REPORT} is gone", label)
