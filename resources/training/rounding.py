"""Writing what was trained as bfloat16 weights so that small updates are not lost.

Most updates are smaller than half the distance of two bfloat16 numbers, and rounding to the nearest takes them back. Rounded up
or down at random, with the probability that makes the mean right (https://arxiv.org/abs/1502.02551, section 3.1), a weight is off
by less than that distance, and what thousands of weights have in common is kept.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file

from resources.models.classifier import HEAD

if TYPE_CHECKING:
    from peft import PeftModel

# bfloat16 is the upper half of a float32.
LOWER_HALF = 1 << 16


def merge_rounding_at_random(adapted: "PeftModel", random_seed: int) -> None:
    """Adds the adapter to the bfloat16 weights below it, which `adapted.unload()` then gives back."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    generator = torch.Generator(layers[0].get_base_layer().weight.device).manual_seed(random_seed)
    with torch.no_grad():
        for layer in layers:
            weight = layer.get_base_layer().weight
            for name in layer.active_adapters:
                weight.copy_(rounded_at_random(weight.float() + layer.get_delta_weight(name).float(), generator))


def round_saved_weights(exact: Path, rounded: Path, random_seed: int) -> None:
    """Writes the model of a directory into another, its float32 weights rounded, but for those that are read in float32.

    Equal weights are rounded in the same way: where several processes trained, tied ones are saved twice, and must stay equal.
    """
    shutil.copytree(exact, rounded, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((rounded / "config.json").read_text())
    exempt, total = _read_in_float32(config), 0
    for path in sorted(exact.glob("*.safetensors")):
        weights = dict[str, torch.Tensor]()
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                weight = file.get_tensor(name)
                if weight.dtype == torch.float32 and not any(part in f".{name}" for part in exempt):
                    noise = xxhash.xxh3_64_intdigest(weight.numpy(), seed=random_seed)
                    weight = rounded_at_random(weight, torch.Generator().manual_seed(noise))
                weights[name] = weight
            save_file(weights, rounded / path.name, file.metadata())
        total += sum(weight.nbytes for weight in weights.values())
    _write_json(rounded / "config.json", config | {"dtype": "bfloat16"})
    if (index := rounded / "model.safetensors.index.json").exists():
        listed = json.loads(index.read_text())
        _write_json(index, listed | {"metadata": listed["metadata"] | {"total_size": total}})


def _read_in_float32(config: Mapping[str, Any]) -> list[str]:
    """Parts of the names of weights that transformers reads in float32, and a classifier's head, which we do."""
    import transformers

    classes = (getattr(transformers, name, None) for name in config.get("architectures") or ())
    strict = (getattr(each, "_keep_in_fp32_modules_strict", None) or () for each in classes)
    return [f".{HEAD}.", *(f".{name}" for names in strict for name in names)]


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def rounded_at_random(numbers: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rounds float32 numbers to one of the two nearest of bfloat16, the more probably the nearer it is; exact ones stay."""
    noise = torch.randint(0, LOWER_HALF, numbers.shape, dtype=torch.int32, device=numbers.device, generator=generator)
    # What is carried over from the lower half makes the number the next larger one of bfloat16.
    upper = (numbers.contiguous().view(torch.int32) + noise) & -LOWER_HALF
    return upper.view(torch.float32).to(torch.bfloat16)
