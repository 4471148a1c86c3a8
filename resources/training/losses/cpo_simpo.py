"""CPO-SimPO: SimPO's loss, and the likelihood of the chosen answer as CPO adds it (arXiv 2401.08417)."""

from typing import Any

from resources.settings.training import CPOSimPO, PreferenceTraining
from resources.training.losses import simpo

REWARD_AXIS = simpo.REWARD_AXIS
gap, sigmoid_argument = simpo.gap, simpo.sigmoid_argument


def trainer(loss: CPOSimPO, training: PreferenceTraining) -> tuple[type, type, dict[str, Any]]:
    """TRL's trainer on exact token ids, the class of its arguments, and the arguments of this loss."""
    trainer_class, config_class, options = simpo.trainer(loss, training)
    return trainer_class, config_class, options | {"cpo_alpha": loss.alpha}
