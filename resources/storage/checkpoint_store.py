"""Model checkpoints: weights, training log and, written last, a manifest. No manifest, no checkpoint."""

import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
from upath import UPath

from resources.common.errors import DamageError, FinalError
from resources.common.progress import Progress
from resources.common.text import asset_label
from resources.storage.files import (
    DAMAGED,
    AnyPath,
    set_aside,
    storage_root,
    temporary_directory_beside,
    write_atomically,
)
from resources.storage.manifests import (
    MANIFEST,
    MERGED,
    ONCE,
    Pointer,
    damaged_file,
    foreign_file,
    is_intact,
    manifest_pointed_to,
    manifest_values,
    others_manifest,
    read_manifest,
    read_pointer,
    weights_manifest,
)

logger = logging.getLogger("synpo.storage")

TRAINING_LOG = "trainer_log.jsonl"
# In the directory of a checkpoint: the run that has read its weights again, or made them.
VERIFIED = "verified_by_run"
RECORDED_LIBRARIES = ("dagster", "torch", "transformers", "trl", "peft", "polars")


class CheckpointError(FinalError):
    """A checkpoint must not be used; the message names it and says what to do."""


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
        return manifest_values(Path(self.directory) / MANIFEST, self.label)


class CheckpointStore(dg.IOManager):
    """Keeps checkpoints under one root, one directory per content, and hands them to assets as `Checkpoint`.

    Each asset and iteration has a small pointer file that names its current checkpoint. An older checkpoint
    stays when a newer one takes its place, because data names it by its sha.

    Models are built and loaded in local directories. Where the root is an object store, a checkpoint is therefore
    built in a local cache and uploaded, its manifest last, and fetched into the cache by whoever lacks it.
    """

    def __init__(
        self, root: str, cache: str | None = None, changes: Sequence[str] = (), run_id: str | None = None
    ) -> None:
        """Takes a local directory, or a URL that fsspec knows and a local cache of the checkpoints in use.

        Args:
            changes: Settings of this run alone, in words, that manifests record.
            run_id: The run that uses it, which reads the weights of each checkpoint again before it uses them.
        """
        self._arguments = root, cache, changes
        self._root = storage_root(root)
        self._local = Path(cache or root)
        self._is_remote = cache is not None
        self._changes = changes
        self._run_id = run_id

    def of_run(self, run_id: str | None) -> "CheckpointStore":
        """The same store, as a run uses it."""
        return CheckpointStore(*self._arguments, run_id)

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
        with temporary_directory_beside(self._local / asset / (partition or ONCE)) as temporary:
            result = build(temporary)
            manifest = {
                **weights_manifest(temporary / MERGED),
                "asset": asset,
                "partition": partition,
                "run_id": context.run.run_id,
                "weights": MERGED,
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
        manifest = weights_manifest(weights)
        manifest |= {"asset": asset, "partition": None, "run_id": context.run.run_id, "weights": MERGED}
        manifest |= {"parents": {}, "trained_on": {}, "settings": dict(origin)}
        with temporary_directory_beside(self._local / asset / ONCE) as temporary:
            (temporary / MERGED).mkdir()
            for name in manifest["files"]:
                (temporary / MERGED / name).symlink_to((weights / name).absolute())
            return self._keep(temporary, manifest)

    def current(self, asset: str, partition: str | None) -> Checkpoint:
        """The newest finished checkpoint of an asset and iteration.

        Its files are checked for presence and size, and read again if this run has not done so yet.
        """
        label = asset_label(asset, partition)
        manifest = manifest_pointed_to(self._pointer(asset, partition), self._root, asset, partition)
        if damaged := damaged_file(self._root / manifest.directory, manifest):
            raise DamageError(f"{damaged} of {label} is missing or has changed size", label)
        found = self._opened(manifest.directory, manifest.label)
        if self._run_id is not None and not _says(Path(found.directory) / VERIFIED, self._run_id):
            self.verify(found)
            write_atomically(Path(found.directory) / VERIFIED, self._run_id.encode())
        return found

    def manifest(self, asset: str, partition: str | None) -> dict[str, Any] | None:
        """The manifest of the current checkpoint, for which no weights are fetched; None if there is no such checkpoint."""
        file = self._file_of_current(asset, partition, MANIFEST)
        return manifest_values(file, asset_label(asset, partition)) if file else None

    def manifest_of_sha(self, sha: str) -> dict[str, Any] | None:
        """The manifest of the checkpoint with these weights, current or superseded; None if it is gone."""
        return next((found for _, found in self._manifests(f"*/*/{sha[:16]}")), None)

    def with_sha(self, asset: str, beginning: str) -> list[Checkpoint]:
        """The checkpoints of an asset, current or superseded, whose sha begins so, in all its iterations."""
        found = [name for name, manifest in self._manifests(f"{asset}/*/*") if manifest["sha"].startswith(beginning)]
        return [self._opened(name, asset) for name in found]

    def _manifests(self, places: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """What the manifests in some places say, by the name of the place; one that was altered is passed over."""
        for file in sorted(self._root.glob(f"{places}/{MANIFEST}"), key=str):
            name = "/".join(file.parent.parts[-3:])
            with contextlib.suppress(DamageError):
                yield name, manifest_values(file, name)

    def _opened(self, name: str, label: str) -> Checkpoint:
        if self._is_remote:
            self._fetch(name, label)
        return open_checkpoint(self._local / name)

    def training_log(self, asset: str, partition: str | None) -> list[dict[str, Any]]:
        """What the trainer of the current checkpoint logged, one entry per step; empty if it is gone or was not trained."""
        file = self._file_of_current(asset, partition, TRAINING_LOG)
        try:
            log = [json.loads(line) for line in file.read_text().splitlines()] if file else []
        except (OSError, ValueError, RecursionError):
            log = [None]
        if not all(isinstance(entry, dict) for entry in log):
            label = asset_label(asset, partition)
            raise DamageError(f"{file} of {label} is no log of a training any more", label)
        return log

    def verify(self, checkpoint: Checkpoint) -> None:
        """Reads every file again, in an object store too, and compares it with the manifest.

        What is damaged is no checkpoint any more: its manifest is set aside.

        Raises:
            DamageError: A file is not as it was written.
            FinalError: Somebody put a file beside the weights that would be loaded with them.
        """
        stored, here = self._root / self._name(checkpoint), Path(checkpoint.directory)
        if not is_intact(stored, checkpoint.sha):
            with contextlib.suppress(FileNotFoundError):
                (stored / MANIFEST).rename(stored / f"{MANIFEST}{DAMAGED}")
            raise _altered(stored, checkpoint.label)
        if self._is_remote and not is_intact(here, checkpoint.sha):
            shutil.rmtree(here, ignore_errors=True)
            self._fetch(self._name(checkpoint), checkpoint.label)
        if foreign := foreign_file(here, read_manifest(here, checkpoint.label)):
            raise FinalError(
                f"{foreign} lies beside the weights of {checkpoint.label}, of which it is no part, and would be loaded with them: "
                "remove it."
            )

    def point_to(self, asset: str, partition: str | None, checkpoint: Checkpoint) -> None:
        """Makes a checkpoint the current one of an asset and iteration."""
        named = Pointer(directory=self._name(checkpoint), asset=asset, partition=partition, sha=checkpoint.sha)
        write_atomically(self._pointer(asset, partition), named.model_dump_json().encode())

    def handle_output(self, context: dg.OutputContext, obj: Checkpoint) -> None:
        """Stores the pointer of a materialized checkpoint asset."""
        partition = context.asset_partition_key if context.has_asset_partitions else None
        self.point_to(context.asset_key.to_user_string(), partition, obj)

    def load_input(self, context: dg.InputContext) -> Checkpoint:
        """Loads the checkpoint that an upstream asset points to."""
        partition = context.asset_partition_key if context.has_asset_partitions else None
        return self.current(context.asset_key.to_user_string(), partition)

    def _pointer(self, asset: str, partition: str | None) -> UPath:
        return self._root / asset / f"{partition or ONCE}.json"

    def _file_of_current(self, asset: str, partition: str | None, name: str) -> UPath | None:
        pointer = self._pointer(asset, partition)
        if not pointer.exists():
            return None
        file = self._root / read_pointer(pointer, asset, partition).directory / name
        return file if file.exists() else None

    def _name(self, checkpoint: Checkpoint) -> str:
        """The place of a checkpoint below the root, which is its place in the cache as well."""
        return Path(checkpoint.directory).relative_to(self._local).as_posix()

    def _keep(self, temporary: Path, manifest: dict[str, Any]) -> Checkpoint:
        """Moves a directory whose weights are complete to its final place, and uploads it to an object store."""
        name = f"{manifest['asset']}/{manifest['partition'] or ONCE}/{manifest['sha'][:16]}"
        manifest["others"] = others_manifest(temporary, manifest["weights"], (MANIFEST, VERIFIED))
        write_atomically(temporary / MANIFEST, json.dumps(manifest, indent=2).encode())
        _move(temporary, self._local / name, manifest["sha"])
        self._retell(self._local / name, manifest)
        if self._is_remote and is_intact(self._root / name, manifest["sha"]):
            self._retell(self._root / name, manifest)
        elif self._is_remote:
            self._upload(name)
        write_atomically(self._local / name / VERIFIED, manifest["run_id"].encode())
        return open_checkpoint(self._local / name)

    def _retell(self, place: AnyPath, manifest: dict[str, Any]) -> None:
        """Has a manifest tell of the newest run that made its weights, as other settings may; what lies beside them stays."""
        kept = read_manifest(place, manifest["asset"]).model_dump()["others"]
        write_atomically(place / MANIFEST, json.dumps(manifest | {"others": kept}, indent=2).encode())

    def _upload(self, name: str) -> None:
        source, target = self._local / name, self._root / name
        if target.exists():
            target.fs.rm(target.path, recursive=True)
        files = [file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file()]
        with Progress(None, f"Copying {name} to {self._root}", logger):
            # No manifest, no checkpoint: it is uploaded last.
            for file in sorted(files, key=lambda file: file == MANIFEST):
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                target.fs.put_file(str(source / file), (target / file).path)

    def _fetch(self, name: str, label: str) -> None:
        """Copies a checkpoint from the object store into the cache, unless it is there."""
        source, target = self._root / name, self._local / name
        with contextlib.suppress(DamageError):
            if damaged_file(target, read_manifest(target, label)) is None:
                return
        with temporary_directory_beside(target) as temporary:
            with Progress(None, f"Copying {name} from {self._root}", logger):
                for file in source.fs.find(source.path):
                    copy = temporary / file.removeprefix(source.path).strip("/")
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    source.fs.get_file(file, str(copy))
            fetched = open_checkpoint(temporary)
            if not is_intact(temporary, fetched.sha):
                raise _altered(source, fetched.label)
            _move(temporary, target, fetched.sha)


def _move(temporary: Path, final: Path, sha: str) -> None:
    """Moves a finished directory to its place, unless the same content is there and undamaged."""
    if not is_intact(final, sha):
        shutil.rmtree(final, ignore_errors=True)
        if final.exists():
            # Somebody put a file there.
            set_aside(UPath(final))
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary.rename(final)


def open_checkpoint(directory: Path) -> Checkpoint:
    """The finished checkpoint in a local directory."""
    manifest = read_manifest(directory, str(directory))
    return Checkpoint(
        asset=manifest.asset,
        partition=manifest.partition,
        sha=manifest.sha,
        weights=str(directory / manifest.weights),
        directory=str(directory),
    )


def _altered(directory: AnyPath, label: str) -> DamageError:
    return DamageError(f"The files of {label} in {directory} were altered after they were written", label)


def _says(file: Path, text: str) -> bool:
    try:
        return file.read_bytes() == text.encode()
    except OSError:
        return False
