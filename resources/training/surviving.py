"""What is left of an update once it is merged and read in the number format of generation.

bfloat16 has 8 bits of precision: next to a weight of 0.02 the nearest other number is 1.2e-4 away. An update that is smaller
than half of that is rounded off, and the trained model answers as the one that it was trained from.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from resources.training.job import SurvivingUpdate


class _Weights:
    """The tensors of a directory by name, each read when it is asked for."""

    def __init__(self, directory: Path) -> None:
        self._files: dict[str, Any] = {}
        for path in sorted(directory.glob("*.safetensors")):
            file = safe_open(path, "pt")
            self._files |= dict.fromkeys(file.keys(), file)

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)


def surviving_update(start: Path, trained: Path, adapter: Path | None, dtype: torch.dtype) -> SurvivingUpdate | None:
    """Compares the weights before and after training, as they are read.

    Args:
        start: The directory of the weights that were trained.
        trained: That of the weights which readers load.
        adapter: That of the LoRA adapter, whose product is the update; without one, it is the difference of the weights.
        dtype: The number format in which readers load them.

    Returns:
        None if nothing was updated, or if the tensors of the two directories have other names.
    """
    before, after = _Weights(start), _Weights(trained)
    common = before.names & after.names
    updates = _differences(before, after, common) if adapter is None else _products(adapter, common)
    along = size = changed = updated = 0.0
    for name, update in updates:
        read = after[name].to(dtype).float() - before[name].to(dtype).float()
        along += (read * update).sum(dtype=torch.float64).item()
        size += (update * update).sum(dtype=torch.float64).item()
        changed += int(((read != 0) & (update != 0)).sum())
        updated += int((update != 0).sum())
    return SurvivingUpdate(along / size, changed / updated) if size else None


def _differences(before: _Weights, after: _Weights, names: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for name in sorted(names):
        if before[name].is_floating_point():
            yield name, after[name].float() - before[name].float()


def _products(adapter: Path, names: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The updates of an adapter: scaled products of its factors, in float32 and one at a time."""
    config, factors = json.loads((adapter / "adapter_config.json").read_text()), _Weights(adapter)
    scale = config["lora_alpha"] / config["r"]
    for factor in sorted(factors.names):
        path, is_first, _ = factor.partition(".lora_A.")
        name = f"{path.removeprefix('base_model.model.')}.weight"
        if is_first and name in names:
            first, second = (factors[f"{path}.lora_{side}.weight"].float() for side in "AB")
            yield name, scale * (second @ first)
