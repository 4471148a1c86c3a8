"""Model checkpoints on disk: weights, training log and, written last, a manifest. No manifest, no checkpoint."""

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg

from resources.files import file_sha256, json_sha256, temporary_directory_beside, write_atomically

RECORDED_LIBRARIES = ("dagster", "torch", "transformers", "trl", "peft", "polars")


class CheckpointError(RuntimeError):
    """A checkpoint is missing, incomplete or altered; the message names it and says what to do."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint.

    Attributes:
        asset: The asset that made it, for example `model_checkpoint`.
        partition: Its iteration (`0001`), or None for assets made once.
        sha: sha256 over the names and contents of all weight files.
        weights: Directory with safetensors weights, config and tokenizer: what generates.
        directory: Directory with `manifest.json`.
    """

    asset: str
    partition: str | None
    sha: str
    weights: str
    directory: str

    @property
    def label(self) -> str:
        """How people name it: `model_checkpoint[0001]`."""
        return f"{self.asset}[{self.partition}]" if self.partition else self.asset

    @property
    def manifest(self) -> dict[str, Any]:
        """The parsed manifest."""
        return json.loads((Path(self.directory) / "manifest.json").read_text())


class CheckpointStore(dg.IOManager):
    """Keeps checkpoints under one root, one directory per content, and hands them to assets as `Checkpoint`.

    Each asset and iteration has a small pointer file that names its current checkpoint. An older checkpoint
    stays on disk when a newer one takes its place, because data on disk names it by its sha.
    """

    def __init__(self, root: str) -> None:
        self.root = root

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
        """Builds a checkpoint in a temporary directory and moves it to its final place.

        Args:
            context: The running asset: names the checkpoint, its iteration and its run.
            build: Fills the given empty directory; the weights that generate go into its folder `merged`.
            parents: The checkpoints it started from or depends on, by role.
            trained_on: Content version of each table that it was trained on, by asset.
            settings: The settings it was trained with.
            random_seed: The seed of the training run.

        Returns:
            The checkpoint, and what `build` returned.
        """
        asset = context.asset_key.to_user_string()
        partition = None if context.assets_def.partitions_def is None else context.partition_key
        place = Path(self.root) / asset / (partition or "once")
        with temporary_directory_beside(place) as temporary:
            result = build(temporary)
            manifest = {
                **_weights_manifest(temporary / "merged"),
                "asset": asset,
                "partition": partition,
                "run_id": context.run.run_id,
                "weights": "merged",
                "parents": {role: {"asset": parent.label, "sha": parent.sha} for role, parent in parents.items()},
                "trained_on": dict(trained_on),
                "settings": dict(settings),
                "random_seed": random_seed,
                "libraries": {name: importlib.metadata.version(name) for name in RECORDED_LIBRARIES},
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            write_atomically(temporary / "manifest.json", json.dumps(manifest, indent=2).encode())
            final = place / manifest["sha"][:16]
            final.parent.mkdir(exist_ok=True)
            if not (final / "manifest.json").exists():
                temporary.rename(final)
        return self._open(final), result

    def adopt(self, context: dg.AssetExecutionContext, weights: Path, origin: Mapping[str, Any]) -> Checkpoint:
        """Registers a model that lies elsewhere (cache, hub snapshot, user directory) without copying it.

        Args:
            context: The running asset.
            weights: Directory with the model; it is only read.
            origin: Where the model came from, for the manifest.
        """
        asset = context.asset_key.to_user_string()
        manifest = _weights_manifest(weights)
        manifest |= {"asset": asset, "partition": None, "run_id": context.run.run_id, "weights": str(weights)}
        manifest |= {"parents": {}, "trained_on": {}, "settings": dict(origin)}
        directory = Path(self.root) / asset / "once" / manifest["sha"][:16]
        write_atomically(directory / "manifest.json", json.dumps(manifest, indent=2).encode())
        return self._open(directory)

    def current(self, asset: str, partition: str | None) -> Checkpoint:
        """The newest finished checkpoint of an asset and iteration, its files checked for presence and size.

        Raises:
            CheckpointError: There is none, or files of it are missing.
        """
        label = f"{asset}[{partition}]" if partition else asset
        pointer = self._pointer(asset, partition)
        if not pointer.exists():
            raise CheckpointError(f"{label} has no checkpoint in {self.root}: materialize {label} first.")
        checkpoint = self._open(Path(self.root) / json.loads(pointer.read_text())["directory"])
        for name, expected in checkpoint.manifest["files"].items():
            file = Path(checkpoint.weights) / name
            if not file.exists() or file.stat().st_size != expected["bytes"]:
                raise CheckpointError(f"{file} of {label} is missing or has changed size: materialize {label} again.")
        return checkpoint

    def verify(self, checkpoint: Checkpoint) -> None:
        """Reads every weight file again and compares it with the manifest.

        Raises:
            CheckpointError: The content of the directory is not what was written.
        """
        if _weights_manifest(Path(checkpoint.weights))["sha"] != checkpoint.sha:
            raise CheckpointError(
                f"The files of {checkpoint.label} in {checkpoint.weights} were altered after they were written: "
                f"materialize {checkpoint.label} again."
            )

    def point_to(self, asset: str, partition: str | None, checkpoint: Checkpoint) -> None:
        """Makes a checkpoint the current one of an asset and iteration."""
        directory = str(Path(checkpoint.directory).relative_to(self.root))
        write_atomically(self._pointer(asset, partition), json.dumps({"directory": directory}).encode())

    def handle_output(self, context: dg.OutputContext, obj: Checkpoint) -> None:
        """Stores the pointer of a materialized checkpoint asset."""
        partition = context.asset_partition_key if context.has_asset_partitions else None
        self.point_to(context.asset_key.to_user_string(), partition, obj)

    def load_input(self, context: dg.InputContext) -> Checkpoint:
        """Loads the checkpoint that an upstream asset points to."""
        partition = context.asset_partition_key if context.has_asset_partitions else None
        return self.current(context.asset_key.to_user_string(), partition)

    def _pointer(self, asset: str, partition: str | None) -> Path:
        return Path(self.root) / asset / f"{partition or 'once'}.json"

    def _open(self, directory: Path) -> Checkpoint:
        file = directory / "manifest.json"
        if not file.exists():
            raise CheckpointError(
                f"{directory} holds no manifest.json, so no finished checkpoint: materialize it again."
            )
        manifest = json.loads(file.read_text())
        return Checkpoint(
            asset=manifest["asset"],
            partition=manifest["partition"],
            sha=manifest["sha"],
            weights=str(directory / manifest["weights"]),
            directory=str(directory),
        )


def _weights_manifest(weights: Path) -> dict[str, Any]:
    files = {
        str(path.relative_to(weights)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(weights.iterdir())
        if path.is_file() and path.name != "README.md"
    }
    return {"sha": json_sha256({name: entry["sha256"] for name, entry in files.items()}), "files": files}
