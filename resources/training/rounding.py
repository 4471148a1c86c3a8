"""Merging an adapter into bfloat16 weights so that small updates are not lost.

Most updates are smaller than half the distance of two bfloat16 numbers, and rounding to the nearest takes them back. Rounded up
or down at random, with the probability that makes the mean right (https://arxiv.org/abs/1502.02551, section 3.1), a weight is off
by less than that distance, and what thousands of weights have in common is kept.
"""

from typing import TYPE_CHECKING

import torch

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


def rounded_at_random(numbers: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rounds float32 numbers to one of the two nearest of bfloat16, the more probably the nearer it is; exact ones stay."""
    noise = torch.randint(0, LOWER_HALF, numbers.shape, dtype=torch.int32, device=numbers.device, generator=generator)
    # What is carried over from the lower half makes the number the next larger one of bfloat16.
    upper = (numbers.contiguous().view(torch.int32) + noise) & -LOWER_HALF
    return upper.view(torch.float32).to(torch.bfloat16)
