"""Which processor and number format the models use."""

import os
import warnings
from typing import TYPE_CHECKING

import dagster as dg

from resources.errors import FinalError
from resources.processes import end_soon_after_interrupt
from resources.settings import Engine

if TYPE_CHECKING:
    import torch


class DeviceResource(dg.ConfigurableResource):
    """A resource that computes with models; its step gives the device back soon after it is cancelled."""

    engine: Engine

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Called by Dagster at the start of each step that uses the resource."""
        end_soon_after_interrupt()


def prepare_device(engine: Engine) -> str:
    """Chooses `cuda` or `cpu` and sets the number of CPU threads.

    Raises:
        FinalError: A GPU was asked for and there is none.
    """
    import torch
    import transformers

    # A freshly drawn output layer and missing optional files are reported at length on every load.
    transformers.logging.set_verbosity_error()
    # TRL still uses option names that transformers has renamed; the warnings say nothing to the reader of a run.
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(engine.threads or os.cpu_count() or 1)
    if engine.device == "cuda" and not torch.cuda.is_available():
        raise FinalError("engine.device is `cuda` but torch sees no GPU: set it to `auto` or `cpu`.")
    return "cuda" if engine.device != "cpu" and torch.cuda.is_available() else "cpu"


def torch_dtype(engine: Engine) -> "torch.dtype":
    """The number format of weights and activations; see `engine.dtype`."""
    import torch

    if engine.dtype != "auto":
        return getattr(torch, engine.dtype)
    return torch.bfloat16 if prepare_device(engine) == "cuda" else torch.float32
