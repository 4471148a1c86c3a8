"""What is left of an update once it is merged and read in the number format of generation.

bfloat16 has 8 bits of precision: next to a weight of 0.02 the nearest other number is 1.2e-4 away. An update that is smaller
than half of that is rounded off, and the trained model answers as the one that it was trained from.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from resources.models.weights import weight_files
from resources.training.job import SurvivingUpdate


class _Weights:
    """The tensors of a directory by name, each read when it is asked for."""

    def __init__(self, directory: Path) -> None:
        self._files: dict[str, Any] = {}
        for path in weight_files(directory):
            file = safe_open(path, "pt")
            self._files |= dict.fromkeys(file.keys(), file)

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)


def surviving_update(
    start: Path, trained: Path, adapter: Path | None, dtype: torch.dtype, exact: Path | None = None
) -> SurvivingUpdate | None:
    """Compares the weights before and after training, as they are read.

    Args:
        start: The directory of the weights that were trained.
        trained: That of the weights which readers load.
        adapter: That of the LoRA adapter, whose product is the update; without one, it is the difference of the weights.
        dtype: The number format in which readers load them.
        exact: That of the weights before they were rounded for readers, if they were.

    Returns:
        None if nothing was updated, or if the tensors of the two directories have other names.
    """
    before, after = _Weights(start), _Weights(trained)
    learned = after if exact is None else _Weights(exact)
    products = None if adapter is None else _Products(adapter)
    along = size = changed = updated = 0.0
    common = before.names & after.names
    for name in sorted(common if products is None else common & products.names):
        old, new = before[name], after[name]
        if not old.is_floating_point():
            continue
        update = learned[name].float() - old.float() if products is None else products[name]
        read = new.to(dtype).float() - old.to(dtype).float()
        along += (read * update).sum(dtype=torch.float64).item()
        size += (update * update).sum(dtype=torch.float64).item()
        changed += int(((read != 0) & (update != 0)).sum())
        updated += int((update != 0).sum())
    return SurvivingUpdate(along / size, changed / updated) if size else None


class _Products:
    """The updates of an adapter, by the names of the weights: scaled products of its factors, in float32, one at a time."""

    def __init__(self, adapter: Path) -> None:
        config = json.loads((adapter / "adapter_config.json").read_text())
        self._scale, self._factors = config["lora_alpha"] / config["r"], _Weights(adapter)
        # GPT-2 keeps its weights with inputs first.
        self._inputs_first = config.get("fan_in_fan_out", False)
        firsts = (name.partition(".lora_A.")[0] for name in self._factors.names if ".lora_A." in name)
        self._paths = {f"{path.removeprefix('base_model.model.')}.weight": path for path in firsts}

    @property
    def names(self) -> set[str]:
        return set(self._paths)

    def __getitem__(self, name: str) -> torch.Tensor:
        first, second = (self._factors[f"{self._paths[name]}.lora_{side}.weight"].float() for side in "AB")
        product = self._scale * (second @ first)
        return product.T if self._inputs_first else product
