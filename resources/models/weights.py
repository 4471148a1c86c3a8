"""Looking into safetensors files."""

from pathlib import Path


def tensors_not_finite(weights: Path) -> list[str]:
    """Names of the tensors of a model that hold NaN or infinite numbers; one tensor at a time is read.

    A loss is logged before the step that it leads to, so the last step can ruin the weights unseen.
    """
    import torch
    from safetensors import safe_open

    found = []
    for file in sorted(weights.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
            found += [name for name in names if not torch.isfinite(tensors.get_tensor(name)).all()]
    return found
