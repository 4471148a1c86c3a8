"""SimPO (arXiv 2405.14734), the loss of the paper: TRL's CPOTrainer without CPO's likelihood term."""

from collections.abc import Mapping
from typing import Any

from resources.settings.training import CPOSimPO, PreferenceTraining, SimPO
from resources.training.rows import ExactTokenIds

REWARD_AXIS = "reward (β times mean log-probability)"


def trainer(loss: SimPO | CPOSimPO, training: PreferenceTraining) -> tuple[type, type, dict[str, Any]]:
    """TRL's trainer on exact token ids, the class of its arguments, and the arguments of this loss."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    from resources.training.completion_logits import CompletionLogits

    class SimPOTrainer(ExactTokenIds, CompletionLogits, CPOTrainer):
        """CPOTrainer; the loss is untouched."""

    return SimPOTrainer, CPOConfig, {
        "max_length": training.max_length,
        "loss_type": "simpo",
        "remove_unused_columns": False,
        # Anything above zero adds a likelihood term that SimPO does not have.
        "cpo_alpha": 0.0,
        "beta": loss.beta,
        "simpo_gamma": loss.gamma,
    }  # fmt: skip


def gap(loss: SimPO | CPOSimPO, logged: Mapping[str, float]) -> str:
    """How far chosen is ahead of rejected: the logged margin is beta times that."""
    return f"gap {logged['rewards/margins'] / loss.beta:+.3f} nats per token"


def sigmoid_argument(loss: SimPO | CPOSimPO, logged: Mapping[str, float]) -> float:
    """The loss is -log sigmoid(margin - gamma)."""
    return logged["rewards/margins"] - loss.gamma
