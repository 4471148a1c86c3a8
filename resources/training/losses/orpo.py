"""ORPO (arXiv 2403.07691): TRL's ORPOTrainer, whose likelihood term is that of the prompt and the chosen answer."""

from collections.abc import Mapping
from typing import Any

from resources.settings.training import ORPO, PreferenceTraining
from resources.training.rows import ExactTokenIds

REWARD_AXIS = "reward (β times mean log-probability)"


def trainer(loss: ORPO, training: PreferenceTraining) -> tuple[type, type, dict[str, Any]]:
    """TRL's trainer on exact token ids, the class of its arguments, and the arguments of this loss."""
    from trl.experimental import orpo

    class ORPOTrainer(ExactTokenIds, orpo.ORPOTrainer):
        """ORPOTrainer; the loss is untouched."""

    options = {"max_length": training.max_length, "remove_unused_columns": False, "beta": loss.beta}
    return ORPOTrainer, orpo.ORPOConfig, options


def gap(loss: ORPO, logged: Mapping[str, float]) -> str:
    """How far chosen is ahead of rejected: the logged margin is beta times that."""
    return f"gap {logged['rewards/margins'] / loss.beta:+.3f} nats per token"


def sigmoid_argument(loss: ORPO, logged: Mapping[str, float]) -> float:
    """The preference term is -log sigmoid(log of the odds ratio), whose weight beta stands outside."""
    return logged["log_odds_chosen"]
