"""The losses of the preference optimisation: one file each, named by its `kind` in the settings."""

import importlib
from types import ModuleType


def loss_module(kind: str) -> ModuleType:
    """All that is particular to a loss: `trainer`, and `REWARD_AXIS`, what its logged rewards are."""
    return importlib.import_module(f"{__name__}.{kind}")
