"""DPO (arXiv 2305.18290) against the checkpoint that the training starts from: TRL's DPOTrainer."""

from collections.abc import Mapping
from typing import Any

from resources.settings.training import DPO, PreferenceTraining

REWARD_AXIS = "reward (β times log-ratio to the start of the training)"


def trainer(loss: DPO, training: PreferenceTraining) -> tuple[type, type, dict[str, Any]]:
    """TRL's trainer on exact token ids, the class of its arguments, and the arguments of this loss."""
    import trl

    class DPOTrainer(trl.DPOTrainer):
        """Takes rows with prompt_ids, chosen_ids and rejected_ids; loss and reference model are untouched."""

        def _prepare_dataset(self, dataset: Any, *arguments: Any) -> Any:
            """Leaves the rows as they are: TRL 1.16 would close every answer with the EOS token, also those cut."""
            return dataset

    return DPOTrainer, trl.DPOConfig, {"max_length": training.max_length, "beta": loss.beta}


def gap(loss: DPO, logged: Mapping[str, float]) -> str:
    """How far chosen is ahead of rejected, compared with the start: DPO's log-ratios are those of whole answers."""
    return f"gap {logged['rewards/margins'] / loss.beta:+.3f} nats per answer since the start"


def sigmoid_argument(loss: DPO, logged: Mapping[str, float]) -> float:
    """The loss is -log sigmoid(margin)."""
    return logged["rewards/margins"]
