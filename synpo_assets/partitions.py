"""What the settings decide before any asset runs: the iterations, and the version of each asset's code."""

import inspect
from types import ModuleType
from typing import Any

import dagster as dg
import polars as pl

from resources.files import json_sha256
from resources.settings import active_settings
from synpo_assets.schemas import Table, column_schema, frame_type

ALL_ASSETS_JOB = "synpo"
GPU_POOL = "gpu"
GROUP = "synpo"
# Arguments of `dg.asset` for an asset that computes with a model: one at a time, and tried again with growing pauses
# when a download, a server or a device fails for a while. Finished shards are kept between the tries.
ON_GPU: dict[str, Any] = {
    "pool": GPU_POOL,
    "retry_policy": dg.RetryPolicy(max_retries=2, delay=5, backoff=dg.Backoff.EXPONENTIAL),
}
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
    """A hash of everything that decides what an asset computes: settings sections by name, and method modules."""
    settings = active_settings().model_dump()
    named = {part: settings[part] for part in parts if isinstance(part, str)}
    sources = {part.__name__: inspect.getsource(part) for part in parts if isinstance(part, ModuleType)}
    return json_sha256({"settings": named, "random_seed": settings["random_seed"], "code": sources})[:12]


def table(schema: type[Table], *parts: str | ModuleType, lazy: bool = False) -> dict[str, Any]:
    """Arguments of `dg.asset` for an asset that is a table of the given schema."""
    return {
        "dagster_type": frame_type(schema, pl.LazyFrame if lazy else pl.DataFrame),
        "metadata": {"dagster/column_schema": column_schema(schema)},
        "io_manager_key": "tables",
        "code_version": code_version(*parts),
        "group_name": GROUP,
    }


def checkpoint(*parts: str | ModuleType) -> dict[str, Any]:
    """Arguments of `dg.asset` for an asset that is a model checkpoint."""
    return {"io_manager_key": "checkpoints", "code_version": code_version(*parts), "group_name": GROUP}
