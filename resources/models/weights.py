"""Looking into safetensors files."""

import math
from pathlib import Path

from resources.common.errors import FinalError
from resources.storage.manifests import SECOND_COPY


def weight_files(weights: Path) -> list[Path]:
    """The safetensors files of a directory that hold its weights."""
    return [file for file in sorted(weights.glob("*.safetensors")) if not file.name.startswith(SECOND_COPY)]


def tensors_not_finite(weights: Path) -> list[str]:
    """Names of the tensors of a model that hold NaN or infinite numbers; one tensor at a time is read.

    A loss is logged before the step that it leads to, so the last step can ruin the weights unseen.
    """
    import torch
    from safetensors import safe_open

    found = []
    for file in weight_files(weights):
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
            found += [name for name in names if not torch.isfinite(tensors.get_tensor(name)).all()]
    return found


def parameter_count(weights: Path) -> int:
    """Parameters of a model directory, read from the headers of its safetensors files.

    Raises:
        FinalError: One of them is damaged.
    """
    return sum(map(_parameters, weight_files(weights)))


def _parameters(file: Path) -> int:
    from safetensors import safe_open

    try:
        with safe_open(file, framework="np") as tensors:
            return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    # It is somebody else's file.
    except Exception as error:
        raise FinalError(f"The weights in {file} cannot be read: {error}. Save or download the model again.") from None
