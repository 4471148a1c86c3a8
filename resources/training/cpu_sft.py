"""Supervised fine-tuning on a CPU: TRL's trainer with a loss that looks at completion tokens only.

On a GPU, TRL 1.16 projects just the unmasked positions onto the vocabulary. Elsewhere it projects every position, the
masked prompt included, in several passes (trl/trainer/utils.py, `compact = _use_triton(...)`), which for a small model
with a large vocabulary is most of the training time. The value is the same: mean cross-entropy of completion tokens.
"""

from typing import Any

from peft import PeftModel
from torch.nn.functional import cross_entropy
from trl import SFTTrainer


class CpuSFTTrainer(SFTTrainer):
    """SFTTrainer for one CPU process; logs the loss, without entropy and token accuracy."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean cross-entropy over the unmasked tokens of the batch that the optimizer step covers."""
        labels = inputs["labels"][:, 1:]
        wanted = labels != -100
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        hidden = base.base_model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        ).last_hidden_state
        logits = base.get_output_embeddings()(hidden[:, :-1][wanted]).float()
        loss = cross_entropy(logits, labels[wanted], reduction="sum") / (num_items_in_batch or wanted.sum())
        return (loss, {"logits": logits}) if return_outputs else loss
