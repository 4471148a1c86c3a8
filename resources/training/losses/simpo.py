"""SimPO (arXiv 2405.14734), the loss of the paper: TRL's CPOTrainer without CPO's likelihood term."""

from typing import Any

from resources.settings.training import CPOSimPO, PreferenceTraining, SimPO
from resources.training.rows import ExactTokenIds

REWARD_AXIS = "reward (β times mean log-probability)"


def trainer(loss: SimPO | CPOSimPO, training: PreferenceTraining) -> tuple[type, type, dict[str, Any]]:
    """TRL's trainer on exact token ids, the class of its arguments, and the arguments of this loss."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    class SimPOTrainer(ExactTokenIds, CPOTrainer):
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
