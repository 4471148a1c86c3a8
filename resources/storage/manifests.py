"""What the manifest of a checkpoint says of its directory, and whether the directory still holds it."""

import json
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError
from upath import UPath

from resources.common.errors import DamageError
from resources.common.progress import Progress
from resources.common.text import asset_label
from resources.storage.files import AnyPath, file_sha256, has_sha256, json_sha256

logger = logging.getLogger("synpo.storage")

MANIFEST = "manifest.json"
# In place of the iteration where something is made once.
ONCE = "once"
# Folders of a checkpoint: the weights that readers load, and the adapter that was merged into them.
MERGED, ADAPTER = "merged", "adapter"
# Begins the names of a second copy of all weights, which Mistral's repositories hold and transformers does not load.
SECOND_COPY = "consolidated"
# Endings of a model's files, but for pickled weights and code.
MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken")
# Those of what transformers and vLLM load with the weights that it lies beside.
LOADED = (*MODEL_FILES, ".bin", ".py")


class _File(BaseModel):
    bytes: int
    sha256: str


class _Parent(BaseModel):
    asset: str
    sha: str
    run_id: str
    directory: str


class Manifest(BaseModel):
    """What every manifest holds; more stands in it for people."""

    asset: str
    partition: str | None
    sha: str  # Of the names and contents of all weight files.
    weights: str
    files: dict[str, _File] = Field(min_length=1)
    others: dict[str, _File] = {}  # What lies beside the weights, such as an adapter; earlier versions did not say.
    run_id: str
    parents: dict[str, _Parent]
    trained_on: dict[str, str]
    settings: dict[str, Any]

    @property
    def label(self) -> str:
        """Whose checkpoint it is, as people name it."""
        return asset_label(self.asset, self.partition)

    @property
    def directory(self) -> str:
        """Its place below the root of the store."""
        return f"{self.asset}/{self.partition or ONCE}/{self.sha[:16]}"


class Pointer(BaseModel):
    """Which checkpoint is the current one of an asset and iteration; those of earlier versions name the directory alone."""

    directory: str
    asset: str | None = None
    partition: str | None = None
    sha: str | None = None


def read_manifest(directory: AnyPath, label: str) -> Manifest:
    """The manifest of a finished checkpoint.

    Raises:
        DamageError: It is gone, or it was altered.
    """
    file = directory / MANIFEST
    manifest = Manifest.model_validate(manifest_values(file, label))
    if manifest.sha != json_sha256({name: entry.sha256 for name, entry in manifest.files.items()}):
        raise _altered(file, label)
    return manifest


def manifest_values(file: AnyPath, label: str) -> dict[str, Any]:
    """All that the file of a manifest says, also what stands in it for people alone.

    Whether its sha is that of its files is left to `read_manifest`.
    """
    try:
        # By the parser that reads it everywhere else: pydantic's own takes numbers that it does not.
        values = json.loads(file.read_bytes())
        Manifest.model_validate(values)
    except FileNotFoundError:
        raise DamageError(f"{file.parent} holds no {MANIFEST}, so no finished checkpoint", label) from None
    except (OSError, ValueError, RecursionError):
        raise _altered(file, label) from None
    return values


def _altered(file: AnyPath, label: str) -> DamageError:
    return DamageError(f"{file} was altered and is no manifest any more", label)


def read_pointer(pointer: AnyPath, asset: str, partition: str | None) -> Pointer:
    """Which checkpoint is the current one of an asset and iteration.

    Raises:
        DamageError: None is, or the file cannot be read.
    """
    label = asset_label(asset, partition)
    try:
        return Pointer.model_validate_json(pointer.read_bytes())
    except FileNotFoundError:
        raise DamageError(f"{label} has no checkpoint in {pointer.parent}", label) from None
    except (OSError, ValidationError):
        raise DamageError(
            f"The pointer {pointer} of {label} was altered and names no checkpoint any more", label
        ) from None


def manifest_pointed_to(pointer: AnyPath, root: AnyPath, asset: str, partition: str | None) -> Manifest:
    """The manifest of the current checkpoint of an asset and iteration.

    Raises:
        DamageError: There is none, or the pointer names what was not made for them.
    """
    label, named = asset_label(asset, partition), read_pointer(pointer, asset, partition)
    manifest = read_manifest(root / named.directory, label)
    # What one asset makes may be the current checkpoint of another: M_0 is the policy of iteration 1.
    pointed_for = (manifest.asset, manifest.partition) if named.asset is None else (named.asset, named.partition)
    is_named = manifest.directory == named.directory and named.sha in (None, manifest.sha)
    if not is_named or pointed_for != (asset, partition):
        raise DamageError(f"The pointer {pointer} names {named.directory}, which was not made for {label}", label)
    return manifest


def damaged_file(directory: AnyPath, manifest: Manifest) -> AnyPath | None:
    """The first weight file that is missing or has not the size that the manifest says."""
    for name, expected in manifest.files.items():
        file = directory / manifest.weights / name
        if not file.exists() or file.stat().st_size != expected.bytes:
            return file
    return None


def is_intact(directory: AnyPath, sha: str) -> bool:
    """Whether a finished checkpoint with this sha lies here whose files, read again, are those of its manifest."""
    try:
        manifest = read_manifest(directory, str(directory))
    except DamageError:
        return False
    listed = {f"{manifest.weights}/{name}": entry for name, entry in manifest.files.items()} | manifest.others
    with Progress(None, f"Reading the files in {directory} for their sha", logger):
        return manifest.sha == sha and all(_is_as_written(directory / name, entry) for name, entry in listed.items())


def _is_as_written(file: AnyPath, written: _File) -> bool:
    return file.is_file() and has_sha256(file, written.sha256)


def foreign_file(directory: AnyPath, manifest: Manifest) -> AnyPath | None:
    """A file that somebody put beside the weights and that would be loaded with them; others do no harm."""
    beside = [file for file in (directory / manifest.weights).iterdir() if file.name not in manifest.files]
    return next((file for file in beside if file.suffix in LOADED and not file.name.startswith(".")), None)


def weights_manifest(weights: AnyPath) -> dict[str, Any]:
    """The files of a directory of weights, with the sha of them all."""
    with Progress(None, f"Reading the files in {weights} for their sha", logger):
        paths = [path for path in UPath(weights).iterdir() if path.is_file() and path.name != "README.md"]
        paths = [path for path in paths if not path.name.startswith(SECOND_COPY)]
        files = {path.name: _written(path) for path in sorted(paths, key=lambda path: path.name)}
    return {"sha": json_sha256({name: entry["sha256"] for name, entry in files.items()}), "files": files}


def others_manifest(directory: Path, weights: str, ours: Collection[str]) -> dict[str, Any]:
    """The files of the directory of a checkpoint that are no weights, and not among `ours`, by their place in it."""
    places = {file.relative_to(directory).as_posix(): file for file in directory.rglob("*") if file.is_file()}
    kept = [name for name in sorted(places) if name not in ours and not name.startswith(f"{weights}/")]
    return {name: _written(places[name]) for name in kept if not places[name].name.startswith(".")}


def _written(path: AnyPath) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
