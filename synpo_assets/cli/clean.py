"""What lies in a home that no run with its settings would read any more, and its removal."""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
from dagster import AssetKey, DagsterInstance, RunsFilter
from dagster._core.storage.dagster_run import NOT_FINISHED_STATUSES
from rich.console import Console
from upath import UPath

from resources.common.errors import DamageError
from resources.common.text import asset_label, labelled
from resources.judging.judge_choice import judge_scorer, server_judge, topic_labeler
from resources.settings.sections import SettingsError
from resources.storage.checkpoint_store import Checkpoint
from resources.storage.files import is_abandoned, storage_root
from resources.storage.manifests import MANIFEST, ONCE, manifest_values, read_pointer
from resources.storage.shards import FINGERPRINT_FILE, Shards
from synpo_assets.algorithm import stages_of
from synpo_assets.cli.healing import made_assets
from synpo_assets.cli.runs import FOREGROUND_TAG, locked
from synpo_assets.graph.history import data_version_of, newest
from synpo_assets.graph.partitions import partition_key
from synpo_assets.graph.services import Services

# Where things are written under a temporary name first; Dagster's own folders are left alone.
WRITTEN_FOLDERS = (
    "tables", "metrics", "settings", "shards", "checkpoints", "cache/checkpoints", "training", "reports", "published",
    "benchmarks",
)  # fmt: skip
TRAINING_KEPT = timedelta(days=1)
SHARDS, TRAININGS, HALVES, CHECKPOINTS = (
    "Shards of other settings", "Unfinished trainings", "Half-written", "Superseded checkpoints",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Leftover:
    """Something that no run with the current settings would read, listed under the heading `group`.

    `made_for` is in words. `rows` is None where there are no finished rows to count, `changed` that of an empty folder.
    """

    group: str
    place: UPath
    made_for: str
    rows: int | None
    size: int
    changed: datetime | None


def print_clean(services: Services, delete: bool, with_checkpoints: bool) -> None:
    """Lists the leftovers of a home, and removes them if asked to; then the home is locked meanwhile as by `synpo run`."""
    console = Console(soft_wrap=True, highlight=False)
    with locked(services.home) if delete else nullcontext(), DagsterInstance.get() as instance:
        if delete:
            refuse_while_at_work(instance, services.home)
        listed = leftovers(instance, services)
        removed = [leftover for leftover in listed if delete and (with_checkpoints or leftover.group != CHECKPOINTS)]
        for group, members in itertools.groupby(listed, lambda leftover: leftover.group):
            console.print(f"[bold]{group}[/]")
            for leftover in members:
                console.print(_line(leftover), markup=False)
        remove(removed)
    console.print(_closing(listed, removed, delete))


def refuse_while_at_work(instance: DagsterInstance, home: Path) -> None:
    """Refuses if a run from the UI, the daemon or `dg launch` is at work in a home whose lock this process holds."""
    # A `synpo run` would hold the lock: what the history shows as its unfinished run was killed.
    runs = [
        run for run in instance.get_runs(RunsFilter(statuses=NOT_FINISHED_STATUSES)) if FOREGROUND_TAG not in run.tags
    ]
    if runs:
        raise SettingsError(
            f"Run {runs[0].run_id} is at work in {home} ({runs[0].status.value}): wait until it ends. If its process is dead, "
            "terminate it in `synpo ui`."
        )


def leftovers(instance: DagsterInstance, services: Services) -> list[Leftover]:
    """Everything in a home that no run with these settings would read, by group."""
    refuse_where_a_checkpoint_is_gone(instance, services)
    home, root = services.home, storage_root(services.settings.storage.root(services.home))
    manifests = _without_past_candidates(_current_manifests(root / "checkpoints"))
    current = [_checkpoint(root / "checkpoints" / name, manifest) for name, manifest in manifests.items()]
    in_use = {shards.folder.name for shards in _shards_in_use(services, current)}
    origins = [manifest["parents"].get(role, {}) for manifest in manifests.values() for role in ("start", "candidate")]
    starts = [origin.get("directory") for origin in origins]
    places = dict.fromkeys([UPath(home), root])
    return [
        *(_shards(folder) for folder in _folders(root / "shards") if folder.name not in in_use),
        *(_training(folder) for folder in _folders(UPath(home) / "training") if _is_obsolete(instance, folder)),
        *(half for place in places for half in _half_written(place)),
        *_superseded(root / "checkpoints", {*manifests, *starts}),
        *_superseded(UPath(home) / "cache" / "checkpoints", {*manifests, *starts}),
    ]


def refuse_where_a_checkpoint_is_gone(instance: DagsterInstance, services: Services) -> None:
    """Raises a DamageError if a checkpoint was made and is not there: what was made with it would seem to be of no use."""
    for partition in (None, *map(partition_key, range(1, services.settings.max_iterations + 1))):
        for name in made_assets(instance, services, partition):
            if services.graph.get(AssetKey(name)).io_manager_key == "checkpoints":
                manifest, label = services.checkpoints.manifest(name, partition), asset_label(name, partition)
                if manifest is None or manifest["sha"][:16] != data_version_of(instance, name, partition):
                    raise DamageError(f"The checkpoint of {label} is gone, so what is in use is not known", label)


def _shards_in_use(services: Services, checkpoints: Iterable[Checkpoint]) -> Iterator[Shards]:
    """All shards that a stage may read: its samplings with each checkpoint, and the scores of scorer and judges."""
    settings, scorer = services.settings, services.scorer
    stages = stages_of(settings)
    scorers = {"reward_model": scorer, "judge_model": judge_scorer(settings.judge, scorer)}
    samplings = [sampling for stage in stages if stage.samplings for sampling in stage.samplings(settings)]
    for checkpoint in checkpoints:
        # A sampling that no stage uses with some checkpoint does no harm here: its folder does not exist.
        yield from (services.language_model.shards_of(checkpoint, sampling) for sampling in samplings)
        if checkpoint.asset in scorers:
            yield scorers[checkpoint.asset].shards_of(checkpoint)
    if settings.judge.server is not None:
        yield server_judge(settings.judge, scorer).shards
        yield topic_labeler(settings.judge, scorer).shards


def remove(removed: Iterable[Leftover]) -> None:
    """Removes leftovers from the disk or the object store."""
    for leftover in removed:
        leftover.place.fs.rm(leftover.place.path, recursive=True)


def _current_manifests(store: UPath) -> dict[str, dict[str, Any]]:
    """The manifests of all checkpoints that a pointer names, by their place below the store.

    Raises:
        DamageError: One of them cannot be read, so that what is in use is not known.
    """
    named = dict[str, str]()
    for pointer in sorted(store.glob("*/*.json"), key=str):
        asset, partition = pointer.parent.name, None if pointer.stem == ONCE else pointer.stem
        named[read_pointer(pointer, asset, partition).directory] = asset_label(asset, partition)
    files = {name: store / name / MANIFEST for name in sorted(named)}
    return {name: manifest_values(file, named[name]) for name, file in files.items() if file.exists()}


def _without_past_candidates(manifests: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Those in use: the candidates of a search are read until M_t of their iteration is made of the best."""
    made = {
        each["partition"]: str(each.get("created", ""))
        for each in manifests.values()
        if each["asset"] == "model_checkpoint"
    }
    return {
        name: each
        for name, each in manifests.items()
        if each["asset"] != "search_candidates"
        or "created" not in each
        or str(each["created"]) > made.get(each["partition"], "")
    }


def _checkpoint(directory: UPath, manifest: Mapping[str, Any]) -> Checkpoint:
    """A checkpoint whose weights need not be on this machine: what was made with it is found by its sha."""
    weights = str(directory / manifest["weights"])
    return Checkpoint(manifest["asset"], manifest["partition"], manifest["sha"], weights, str(directory))


def _shards(folder: UPath) -> Leftover:
    description = _json(folder / FINGERPRINT_FILE)
    made_for, sha = description.pop("made_for", "unknown"), str(description.pop("checkpoint", ""))
    rows = sum(_height(file) for file in folder.glob("*.parquet"))
    return _leftover(SHARDS, folder, f"{made_for} {sha[:16]}, {', '.join(_stated(description))}", rows)


def _training(folder: UPath) -> Leftover:
    return _leftover(TRAININGS, folder, ", ".join(_stated(_json(folder / "description.json"))))


def _is_obsolete(instance: DagsterInstance, folder: UPath) -> bool:
    """Whether no run will go on from a training: its asset was made since, or it was given up long ago."""
    description = _json(folder / "description.json")
    try:
        created = datetime.fromisoformat(description["created"]).astimezone(UTC)
    except (KeyError, TypeError, ValueError, OverflowError):
        return True
    asset, partition = labelled(str(description.get("asset") or ""))
    record = newest(instance, asset, partition) if asset else None
    # A long training may have been begun days ago and have saved its newest state a minute ago.
    given_up = datetime.now(UTC) - (_training(folder).changed or created) > TRAINING_KEPT
    return given_up or (record is not None and record.timestamp > created.timestamp())


def _half_written(root: UPath) -> Iterator[Leftover]:
    for folder in WRITTEN_FOLDERS:
        for place in (root / folder).rglob(".*.tmp"):
            inside_another = any(part.startswith(".") for part in place.relative_to(root).parts[:-1])
            if not inside_another and (place.is_file() or is_abandoned(place)):
                yield _leftover(HALVES, place, "written under a temporary name")


def _superseded(store: UPath, in_use: set[str | None]) -> Iterator[Leftover]:
    for directory in sorted(store.glob("*/*/*"), key=str):
        name = directory.relative_to(store).as_posix()
        hidden = any(part.startswith(".") for part in name.split("/"))
        if directory.is_dir() and not hidden and name not in in_use:
            manifest = _json(directory / MANIFEST)
            run_id = manifest.get("run_id")
            made_for = f"made by run {run_id}" if run_id else "no manifest: it was never finished"
            yield _leftover(CHECKPOINTS, directory, made_for)


def _folders(place: UPath) -> list[UPath]:
    return sorted((folder for folder in place.iterdir() if folder.is_dir()), key=str) if place.exists() else []


def _leftover(group: str, place: UPath, made_for: str, rows: int | None = None) -> Leftover:
    size, changed = 0, list[datetime]()
    for file in place.fs.find(place.path):
        # A run at work may have renamed or removed it since.
        with suppress(FileNotFoundError):
            info = place.fs.info(file)
            changed.append(place.fs.modified(file))
            # What a link leads to is not freed with it.
            size += 0 if info.get("islink") else info["size"]
    return Leftover(group, place, made_for, rows, size, max(changed, default=None))


def _height(file: UPath) -> int:
    """The rows of a shard; none if it was damaged on the disk."""
    try:
        with file.open("rb") as opened:
            return pl.scan_parquet(opened).select(pl.len()).collect().item()
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException):
        return 0


def _json(file: UPath) -> dict[str, Any]:
    """What a small file says; nothing if it was never written, or was damaged."""
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _stated(values: Mapping[str, Any]) -> Iterator[str]:
    """`temperature 0.7` and so on, without what is empty."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _stated(value)
        elif value not in (None, [], ""):
            yield f"{name} {value}"


def _line(leftover: Leftover) -> str:
    age = ""
    if leftover.changed is not None:
        age = f", {(datetime.now(UTC) - leftover.changed) / timedelta(days=1):.1f} days old"
    rows = "" if leftover.rows is None else f"{leftover.rows} rows, "
    return f"  {leftover.place}: {rows}{_megabytes([leftover])}{age}\n    {leftover.made_for}"


def _closing(listed: list[Leftover], removed: list[Leftover], delete: bool) -> str:
    if not listed:
        return "Everything here is in use: nothing to clean."
    kept = [leftover for leftover in listed if leftover not in removed]
    checkpoints = [leftover for leftover in kept if leftover.group == CHECKPOINTS]
    others = [leftover for leftover in kept if leftover.group != CHECKPOINTS]
    done = f"Removed {_megabytes(removed)}." if delete else f"In all {_megabytes(listed)}; nothing was removed."
    sentences = [done]
    if others:
        sentences.append(f"`synpo clean --delete` removes {_megabytes(others)} of it.")
    if checkpoints:
        sentences.append(
            f"The checkpoints ({_megabytes(checkpoints)}) go with --checkpoints in addition: earlier data names them."
        )
    return " ".join(sentences)


def _megabytes(leftovers: Iterable[Leftover]) -> str:
    return f"{sum(leftover.size for leftover in leftovers) / 1e6:,.1f} MB"
