"""Supervised fine-tuning on a CPU: TRL's trainer with a loss that looks at completion tokens only.

On a GPU, TRL 1.16 projects just the unmasked positions onto the vocabulary. Elsewhere it projects every position, the
masked prompt included, in several passes (trl/trainer/utils.py, `compact = _use_triton(...)`), which for a small model
with a large vocabulary is most of the training time. The value is the same: mean cross-entropy of completion tokens. Some models
scale or cap their logits (Granite, Cohere, Gemma 2, Falcon-H1): whether the projection alone gives the model's own logits is tried
on the first batch, and where it does not, the model's own forward is used.
"""

from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from trl import SFTTrainer

from resources.training.rows import IGNORED

# Logits so many times larger are capped where any are.
ENLARGED = 1000.0


class CpuSFTTrainer(SFTTrainer):
    """SFTTrainer for one CPU process; logs the loss, without entropy and token accuracy."""

    _only_projects: bool | None = None

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean cross-entropy over the unmasked tokens of the batch that the optimizer step covers."""
        labels = inputs["labels"][:, 1:]
        wanted = labels != IGNORED
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        read = {name: value for name, value in inputs.items() if name != "labels"} | {"use_cache": False}
        if self._only_projects is None:
            self._only_projects = only_projects(base, inputs["input_ids"][:1])
        with self.accelerator.autocast():
            if self._only_projects:
                hidden = base.base_model(**read).last_hidden_state
                logits = base.get_output_embeddings()(hidden[:, :-1][wanted]).float()
            else:
                logits = base(**read).logits[:, :-1][wanted].float()
        loss = cross_entropy(logits, labels[wanted], reduction="sum") / (num_items_in_batch or wanted.sum())
        return (loss, {"logits": logits}) if return_outputs else loss


def only_projects(model: Any, input_ids: torch.Tensor) -> bool:
    """Whether a model's logits are its last hidden states times its output embeddings, neither scaled nor capped."""
    head, training = model.get_output_embeddings(), model.training
    if head is None:
        return False
    enlarging = head.register_forward_hook(lambda _module, _read, logits: logits * ENLARGED)
    try:
        with torch.no_grad():
            # Dropout would make any two passes differ.
            model.eval()
            hidden = getattr(model.base_model(input_ids=input_ids, use_cache=False), "last_hidden_state", None)
            own = model(input_ids=input_ids, use_cache=False).logits
            return hidden is not None and torch.allclose(
                head(hidden).float(), own.float(), rtol=1e-2, atol=1e-2 * ENLARGED
            )
    finally:
        enlarging.remove()
        model.train(training)
