"""Model checkpoints: weights, training log and, written last, a manifest. No manifest, no checkpoint."""

import dataclasses
import importlib.metadata
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
from upath import UPath

from resources.common.errors import FinalError
from resources.common.progress import Progress
from resources.common.text import asset_label
from resources.storage.files import (
    AnyPath,
    file_sha256,
    json_sha256,
    storage_root,
    temporary_directory_beside,
    write_atomically,
)

logger = logging.getLogger("synpo.storage")

TRAINING_LOG = "trainer_log.jsonl"
REQUIRED_KEYS = {"asset", "partition", "sha", "weights", "files"}
RECORDED_LIBRARIES = ("dagster", "torch", "transformers", "trl", "peft", "polars")


class CheckpointError(FinalError):
    """A checkpoint is missing, incomplete or altered; the message names it and says what to do."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint."""

    asset: str
    partition: str | None  # Its iteration (`0001`); None for assets made once.
    sha: str  # Of the names and contents of all weight files.
    weights: str  # Local directory with safetensors weights, config and tokenizer: what generates.
    directory: str

    @property
    def label(self) -> str:
        """How people name it: `model_checkpoint[0001]`."""
        return asset_label(self.asset, self.partition)

    @property
    def manifest(self) -> dict[str, Any]:
        """The parsed manifest."""
        return json.loads((Path(self.directory) / "manifest.json").read_text())


class CheckpointStore(dg.IOManager):
    """Keeps checkpoints under one root, one directory per content, and hands them to assets as `Checkpoint`.

    Each asset and iteration has a small pointer file that names its current checkpoint. An older checkpoint
    stays when a newer one takes its place, because data names it by its sha.

    Models are built and loaded in local directories. Where the root is an object store, a checkpoint is therefore
    built in a local cache and uploaded, its manifest last, and fetched into the cache by whoever lacks it.
    """

    def __init__(self, root: str, cache: str | None = None, changes: Sequence[str] = ()) -> None:
        """Takes a local directory, or a URL that fsspec knows and a local cache of the checkpoints in use.

        Args:
            changes: Settings of this run alone, in words, that manifests record.
        """
        self._root = storage_root(root)
        self._local = Path(cache or root)
        self._is_remote = cache is not None
        self._changes = changes

    def create(
        self,
        context: dg.AssetExecutionContext,
        build: Callable[[Path], Any],
        *,
        parents: Mapping[str, Checkpoint],
        trained_on: Mapping[str, str],
        settings: Mapping[str, Any],
        random_seed: int,
    ) -> tuple[Checkpoint, Any]:
        """Builds a checkpoint in a temporary directory and moves it to its final place, and hands on what `build` returned.

        Content that is there already is kept; if it was damaged since, it is replaced.

        Args:
            build: Fills the given empty directory; the weights that generate go into its folder `merged`.
            trained_on: Content version of each table that it was trained on, by asset.
        """
        asset = context.asset_key.to_user_string()
        partition = None if context.assets_def.partitions_def is None else context.partition_key
        with temporary_directory_beside(self._local / asset / (partition or "once")) as temporary:
            result = build(temporary)
            manifest = {
                **_weights_manifest(temporary / "merged"),
                "asset": asset,
                "partition": partition,
                "run_id": context.run.run_id,
                "weights": "merged",
                "parents": {
                    role: {
                        "asset": parent.label,
                        "sha": parent.sha,
                        "run_id": parent.manifest["run_id"],
                        "directory": self._name(parent),
                    }
                    for role, parent in parents.items()
                },
                "trained_on": dict(trained_on),
                "settings": dict(settings),
                "changes": list(self._changes),
                "random_seed": random_seed,
                "libraries": {name: importlib.metadata.version(name) for name in RECORDED_LIBRARIES},
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            return self._keep(temporary, manifest), result

    def adopt(self, context: dg.AssetExecutionContext, weights: Path, origin: Mapping[str, Any]) -> Checkpoint:
        """Registers a model that lies elsewhere (cache, hub snapshot, user directory) by links to its files."""
        asset = context.asset_key.to_user_string()
        manifest = _weights_manifest(weights)
        manifest |= {"asset": asset, "partition": None, "run_id": context.run.run_id, "weights": "merged"}
        manifest |= {"parents": {}, "trained_on": {}, "settings": dict(origin)}
        with temporary_directory_beside(self._local / asset / "once") as temporary:
            (temporary / "merged").mkdir()
            for name in manifest["files"]:
                (temporary / "merged" / name).symlink_to((weights / name).absolute())
            return self._keep(temporary, manifest)

    def current(self, asset: str, partition: str | None) -> Checkpoint:
        """The newest finished checkpoint of an asset and iteration, its files checked for presence and size."""
        label = asset_label(asset, partition)
        pointer = self._pointer(asset, partition)
        if not pointer.exists():
            raise CheckpointError(f"{label} has no checkpoint in {self._root}: materialize {label} first.")
        name = json.loads(pointer.read_text())["directory"]
        if damaged := _damaged_file(self._root / name):
            raise CheckpointError(f"{damaged} of {label} is missing or has changed size: materialize {label} again.")
        if self._is_remote:
            self._fetch(name)
        return open_checkpoint(self._local / name)

    def manifest(self, asset: str, partition: str | None) -> dict[str, Any] | None:
        """The manifest of the current checkpoint, for which no weights are fetched; None if there is no such checkpoint."""
        file = self._file_of_current(asset, partition, "manifest.json")
        return json.loads(file.read_text()) if file else None

    def manifest_of_sha(self, sha: str) -> dict[str, Any] | None:
        """The manifest of the checkpoint with these weights, current or superseded; None if it is gone."""
        files = sorted(self._root.glob(f"*/*/{sha[:16]}/manifest.json"), key=str)
        return json.loads(files[0].read_text()) if files else None

    def training_log(self, asset: str, partition: str | None) -> list[dict[str, Any]]:
        """What the trainer of the current checkpoint logged, one entry per step; empty if it is gone or was not trained."""
        file = self._file_of_current(asset, partition, TRAINING_LOG)
        return [json.loads(line) for line in file.read_text().splitlines()] if file else []

    def verify(self, checkpoint: Checkpoint) -> None:
        """Reads every weight file again, in an object store too, and compares it with the manifest."""
        stored = self._root / self._name(checkpoint)
        if not _is_intact(stored, checkpoint.sha):
            raise _altered(stored, checkpoint.label)
        if self._is_remote and not _is_intact(Path(checkpoint.directory), checkpoint.sha):
            shutil.rmtree(checkpoint.directory, ignore_errors=True)
            self._fetch(self._name(checkpoint))

    def point_to(self, asset: str, partition: str | None, checkpoint: Checkpoint) -> None:
        """Makes a checkpoint the current one of an asset and iteration."""
        write_atomically(self._pointer(asset, partition), json.dumps({"directory": self._name(checkpoint)}).encode())

    def handle_output(self, context: dg.OutputContext, obj: Checkpoint) -> None:
        """Stores the pointer of a materialized checkpoint asset."""
        partition = context.asset_partition_key if context.has_asset_partitions else None
        self.point_to(context.asset_key.to_user_string(), partition, obj)

    def load_input(self, context: dg.InputContext) -> Checkpoint:
        """Loads the checkpoint that an upstream asset points to."""
        partition = context.asset_partition_key if context.has_asset_partitions else None
        return self.current(context.asset_key.to_user_string(), partition)

    def _pointer(self, asset: str, partition: str | None) -> UPath:
        return self._root / asset / f"{partition or 'once'}.json"

    def _file_of_current(self, asset: str, partition: str | None, name: str) -> UPath | None:
        pointer = self._pointer(asset, partition)
        if not pointer.exists():
            return None
        file = self._root / json.loads(pointer.read_text())["directory"] / name
        return file if file.exists() else None

    def _name(self, checkpoint: Checkpoint) -> str:
        """The place of a checkpoint below the root, which is its place in the cache as well."""
        return Path(checkpoint.directory).relative_to(self._local).as_posix()

    def _keep(self, temporary: Path, manifest: dict[str, Any]) -> Checkpoint:
        """Moves a directory whose weights are complete to its final place, and uploads it to an object store."""
        name = f"{manifest['asset']}/{manifest['partition'] or 'once'}/{manifest['sha'][:16]}"
        content = json.dumps(manifest, indent=2).encode()
        write_atomically(temporary / "manifest.json", content)
        _move(temporary, self._local / name, manifest["sha"])
        # Equal weights may come of other settings: the manifest tells of the newest run that made them.
        write_atomically(self._local / name / "manifest.json", content)
        if self._is_remote and _is_intact(self._root / name, manifest["sha"]):
            write_atomically(self._root / name / "manifest.json", content)
        elif self._is_remote:
            self._upload(name)
        return open_checkpoint(self._local / name)

    def _upload(self, name: str) -> None:
        source, target = self._local / name, self._root / name
        if target.exists():
            target.fs.rm(target.path, recursive=True)
        files = [file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file()]
        with Progress(None, f"Copying {name} to {self._root}", logger):
            # No manifest, no checkpoint: it is uploaded last.
            for file in sorted(files, key=lambda file: file == "manifest.json"):
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                target.fs.put_file(str(source / file), (target / file).path)

    def _fetch(self, name: str) -> None:
        """Copies a checkpoint from the object store into the cache, unless it is there."""
        source, target = self._root / name, self._local / name
        if (target / "manifest.json").exists() and _damaged_file(target) is None:
            return
        with temporary_directory_beside(target) as temporary:
            with Progress(None, f"Copying {name} from {self._root}", logger):
                for file in source.fs.find(source.path):
                    copy = temporary / file.removeprefix(source.path).strip("/")
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    source.fs.get_file(file, str(copy))
            fetched = open_checkpoint(temporary)
            if not _is_intact(temporary, fetched.sha):
                raise _altered(source, fetched.label)
            _move(temporary, target, fetched.sha)


def _move(temporary: Path, final: Path, sha: str) -> None:
    """Moves a finished directory to its place, unless the same content is there and undamaged."""
    if not _is_intact(final, sha):
        shutil.rmtree(final, ignore_errors=True)
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary.rename(final)


def _manifest(directory: AnyPath) -> dict[str, Any]:
    file = directory / "manifest.json"
    if not file.exists():
        raise CheckpointError(f"{directory} holds no manifest.json, so no finished checkpoint: materialize it again.")
    try:
        manifest = json.loads(file.read_text())
        if not isinstance(manifest, dict) or not manifest.keys() >= REQUIRED_KEYS:
            raise ValueError
    except ValueError:
        raise CheckpointError(f"{file} was altered and is no manifest any more: materialize it again.") from None
    return manifest


def open_checkpoint(directory: Path) -> Checkpoint:
    """The finished checkpoint in a local directory."""
    manifest = _manifest(directory)
    return Checkpoint(
        asset=manifest["asset"],
        partition=manifest["partition"],
        sha=manifest["sha"],
        weights=str(directory / manifest["weights"]),
        directory=str(directory),
    )


def _damaged_file(directory: AnyPath) -> AnyPath | None:
    """The first weight file that is missing or has not the size that the manifest says."""
    manifest = _manifest(directory)
    for name, expected in manifest["files"].items():
        file = directory / manifest["weights"] / name
        if not file.exists() or file.stat().st_size != expected["bytes"]:
            return file
    return None


def _is_intact(directory: AnyPath, sha: str) -> bool:
    """Whether a finished checkpoint lies here whose weight files, read again, have this sha."""
    if not (directory / "manifest.json").exists():
        return False
    weights = directory / _manifest(directory)["weights"]
    return weights.exists() and _weights_manifest(weights)["sha"] == sha


def _altered(directory: AnyPath, label: str) -> CheckpointError:
    return CheckpointError(
        f"The files of {label} in {directory} were altered after they were written: materialize {label} again."
    )


def _weights_manifest(weights: AnyPath) -> dict[str, Any]:
    with Progress(None, f"Reading the files in {weights} for their sha", logger):
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in sorted(UPath(weights).iterdir(), key=lambda path: path.name)
            if path.is_file() and path.name != "README.md"
        }
    return {"sha": json_sha256({name: entry["sha256"] for name, entry in files.items()}), "files": files}
