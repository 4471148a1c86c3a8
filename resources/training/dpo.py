"""DPO on exact token ids: TRL's trainer without its own tokenization, for the reasons given in `simpo`."""

from typing import Any

import trl


class DPOTrainer(trl.DPOTrainer):
    """TRL's DPOTrainer for rows with prompt_ids, chosen_ids and rejected_ids; loss and reference model are untouched."""

    def _prepare_dataset(self, dataset: Any, *arguments: Any) -> Any:
        """Leaves the rows as they are: TRL 1.16 would close every answer with the EOS token, also those that were cut."""
        return dataset
