"""Which settings an asset was made with: those that its code version reads, kept as data beside its metrics.

`settings.yaml` says what the next run reads; these tables say what each asset and iteration was made with.
"""

import json
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import dagster as dg
import polars as pl
from pydantic_core import to_jsonable_python

from resources.common.errors import FinalError
from resources.common.text import asset_label, visible
from resources.settings.method import PreferenceOptimization
from resources.settings.sections import flattened
from resources.settings.settings import Settings
from resources.storage.manifests import ONCE
from resources.storage.tables import ParquetTables
from synpo_assets.graph.partitions import partition_key, partition_of
from synpo_assets.graph.services import USED_SETTINGS, Services
from synpo_assets.graph.stage import LAST, READS
from synpo_assets.graph.texts import MISSING


def values_of(names: Iterable[str], settings: Settings) -> dict[str, str]:
    """The settings that dotted names of settings or whole sections stand for, each as text."""
    values = flattened({name: to_jsonable_python(operator.attrgetter(name)(settings)) for name in names})
    return {name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for name, value in values}


def record_settings(context: dg.AssetExecutionContext, services: Services) -> dict[str, Any]:
    """Keeps the settings that the running asset reads, and shows them: in bold what changed since the previous iteration."""
    asset, partition = context.asset_key.to_user_string(), partition_of(context)
    # Only stages state what they read.
    now = values_of(context.assets_def.metadata_by_key[context.asset_key].get(READS, []), services.settings)
    rows = [(asset, *each) for each in now.items()]
    services.used_settings.write(asset, partition or ONCE, pl.DataFrame(rows, schema=USED_SETTINGS, orient="row"))
    earlier = partition_key(int(partition) - 1) if partition else ""
    before = dict(_recorded(services.used_settings, earlier).filter(asset=asset).select("setting", "value").iter_rows())
    differing = differing_settings([before, now]) if before else {}
    lines = [
        f"| **{name}** | **{_cell(value)}** ({earlier}: {_cell(old)}) |" for name, (old, value) in differing.items()
    ]
    lines += [f"| {name} | {_cell(value)} |" for name, value in now.items() if name not in differing]
    return {"settings": dg.MetadataValue.md("\n".join(["| setting | value |", "|---|---|", *lines]))}


def optimized_with(manifest: Mapping[str, Any], settings: Settings) -> PreferenceOptimization:
    """What M_t was trained with, which a search may have chosen; the settings where its manifest does not say."""
    made = manifest.get("settings", {}).get("preference_optimization", settings.preference_optimization)
    return PreferenceOptimization.model_validate(made)


def refuse_other_settings(services: Services, asset: str, partition: str, names: Iterable[str]) -> None:
    """Raises a sentence if an asset of an iteration was made with other values of these settings than those of now."""
    made = _recorded(services.used_settings, partition).filter(asset=asset).select("setting", "value").iter_rows()
    differing = differing_settings([dict(made), values_of(names, services.settings)], in_all=True)
    if differing:
        label = asset_label(asset, partition)
        told = "; ".join(f"{name} {_cell(then)} then, {_cell(now)} now" for name, (then, now) in differing.items())
        raise FinalError(
            f"{label} was made with other settings ({told}), and what is made with those of now cannot be compared with it: "
            f"materialize {label} again first."
        )


def used_in(store: ParquetTables, partition: str) -> dict[str, str]:
    """The settings that an iteration was made with, as text; all values of one that its assets do not agree on."""
    # The report does not report itself.
    rows = _recorded(store, partition).filter(pl.col("asset") != LAST)
    values = rows.group_by("setting", maintain_order=True).agg(pl.col("value").unique().sort())
    return {setting: " and ".join(each) for setting, each in values.iter_rows()}


def differing_settings(places: Iterable[Mapping[str, str]], in_all: bool = False) -> dict[str, list[str]]:
    """The settings that are not the same in all places, by name, with the value in each.

    Args:
        places: The settings of iterations or homes, as text.
        in_all: Whether what one of them lacks is left out: what was not made in an iteration has no settings there.
    """
    places = list(places)
    names = dict.fromkeys(name for one in places for name in one if not in_all or all(name in each for each in places))
    values = {name: [one.get(name, MISSING) for one in places] for name in names}
    return {name: each for name, each in values.items() if len(set(each)) > 1}


def _recorded(store: ParquetTables, partition: str) -> pl.DataFrame:
    return pl.concat([pl.DataFrame(schema=USED_SETTINGS), *store.of_partition(partition)])


def _cell(value: str) -> str:
    """A text within a line of a table."""
    return " ".join(visible(value).split()).replace("|", "\\|")
