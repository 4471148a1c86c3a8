"""The losses of the preference optimisation: one file each, named by its `kind` in the settings."""

import importlib
from collections.abc import Mapping
from types import ModuleType

from resources.settings.training import Loss


def loss_module(kind: str) -> ModuleType:
    """All that is particular to a loss.

    It has `trainer`, and `REWARD_AXIS`, what its logged rewards are. It may have `gap`, how far chosen is ahead of rejected in
    a logged step, as text, and `sigmoid_argument`, the mean of what the sigmoid of the loss is taken of; its gradient of a pair
    has the weight sigmoid(-argument).
    """
    return importlib.import_module(f"{__name__}.{kind}")


def pairs_text(loss: Loss | None, logged: Mapping[str, float]) -> str:
    """What a logged step says of its pairs, to follow the loss; empty where the training has none."""
    if loss is None or "rewards/accuracies" not in logged:
        return ""
    gap = getattr(loss_module(loss.kind), "gap", None)
    parts = [f"reward accuracy {float(logged['rewards/accuracies']):.0%}", *([gap(loss, logged)] if gap else [])]
    return "".join(f", {part}" for part in parts)


def sigmoid_argument(loss: Loss, logged: Mapping[str, float]) -> float | None:
    """The mean of what the loss's sigmoid is taken of in a logged step; None if the loss has none, or nothing was logged."""
    argument = getattr(loss_module(loss.kind), "sigmoid_argument", None)
    return float(argument(loss, logged)) if argument and "rewards/margins" in logged else None
