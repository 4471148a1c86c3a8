"""Writing what was trained as bfloat16 weights so that small updates are not lost.

Most updates are smaller than half the distance of two bfloat16 numbers, and rounding to the nearest takes them back. Rounded up
or down at random, with the probability that makes the mean right (https://arxiv.org/abs/1502.02551, section 3.1), a weight is off
by less than that distance, and what thousands of weights have in common is kept.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
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
    """Writes the model of a directory into another, its float32 weights rounded; a classifier's head is read in float32."""
    shutil.copytree(exact, rounded, ignore=shutil.ignore_patterns("*.safetensors"))
    generator = torch.Generator().manual_seed(random_seed)
    for path in sorted(exact.glob("*.safetensors")):
        weights = dict[str, torch.Tensor]()
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                weight = file.get_tensor(name)
                is_read_rounded = weight.dtype == torch.float32 and not name.startswith(f"{HEAD}.")
                weights[name] = rounded_at_random(weight, generator) if is_read_rounded else weight
            save_file(weights, rounded / path.name, file.metadata())
    config = json.loads((rounded / "config.json").read_text())
    (rounded / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}, indent=2) + "\n")


def rounded_at_random(numbers: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rounds float32 numbers to one of the two nearest of bfloat16, the more probably the nearer it is; exact ones stay."""
    noise = torch.randint(0, LOWER_HALF, numbers.shape, dtype=torch.int32, device=numbers.device, generator=generator)
    # What is carried over from the lower half makes the number the next larger one of bfloat16.
    upper = (numbers.contiguous().view(torch.int32) + noise) & -LOWER_HALF
    return upper.view(torch.float32).to(torch.bfloat16)
