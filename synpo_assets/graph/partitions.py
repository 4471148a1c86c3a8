"""What the settings decide before any asset runs: the iterations, and the version of each asset's code."""

import functools
import operator
from pathlib import Path
from types import ModuleType
from typing import Any

import dagster as dg
import polars as pl

from resources.settings.files import active_settings
from resources.storage.files import json_sha256
from synpo_assets.graph.schemas import Table, column_schema, frame_type

ALL_ASSETS_JOB = "synpo"
GPU_POOL = "gpu"
GROUP = "synpo"
# What is made only when it is asked for by name has this tag: no job, no sensor and no `synpo run` makes it. A second group
# would open the graph collapsed.
OPT_IN_TAG = "synpo/opt_in"
# A download, a server or a device may fail for a while; finished shards are kept between the tries.
RETRIES = dg.RetryPolicy(max_retries=2, delay=5, backoff=dg.Backoff.EXPONENTIAL)
ITERATIONS = dg.StaticPartitionsDefinition(
    [f"{number:04d}" for number in range(1, active_settings().max_iterations + 1)]
)


def iteration_of(context: dg.AssetExecutionContext) -> int:
    """The iteration of the running asset, counted from 1."""
    return int(context.partition_key)


def partition_key(iteration: int) -> str:
    """The partition key of an iteration: 1 -> `0001`."""
    return f"{iteration:04d}"


def code_version(*parts: str | ModuleType) -> str:
    """A hash of everything that decides what an asset computes.

    Args:
        parts: Settings by dotted name (`policy`, `policy.training.beta`), and method modules, which count with the
            templates in the folder of the same name.
    """
    settings = active_settings().model_dump()
    named = {part: functools.reduce(operator.getitem, part.split("."), settings)
             for part in parts if isinstance(part, str)}  # fmt: skip
    sources = {part.__name__: _source(part) for part in parts if isinstance(part, ModuleType)}
    return json_sha256({"settings": named, "random_seed": settings["random_seed"], "code": sources})[:12]


def _source(module: ModuleType) -> list[str]:
    file = Path(str(module.__file__))
    return [path.read_text() for path in (file, *sorted(file.with_suffix("").glob("*.jinja")))]


def table(schema: type[Table], *parts: str | ModuleType, lazy: bool = False) -> dict[str, Any]:
    """Arguments of `dg.asset` for an asset that is a table of the given schema."""
    return {
        "dagster_type": frame_type(schema, pl.LazyFrame if lazy else pl.DataFrame),
        "metadata": {"dagster/column_schema": column_schema(schema)},
        "io_manager_key": "tables",
        "code_version": code_version(*parts),
        "group_name": GROUP,
        "retry_policy": RETRIES,
    }


def checkpoint(*parts: str | ModuleType) -> dict[str, Any]:
    """Arguments of `dg.asset` for an asset that is a model checkpoint."""
    return {
        "io_manager_key": "checkpoints",
        "code_version": code_version(*parts),
        "group_name": GROUP,
        "retry_policy": RETRIES,
    }
