"""SimPO's forward pass with logits of completion tokens only, a piece at a time.

TRL 1.16 keeps the logits of all tokens of both sides, prompts and padding included, and their gradients: with a large vocabulary
they are most of the memory of a training, and with a small model much of its time. Here the hidden states of completion tokens are
projected piece by piece; if there are several pieces, the backward pass projects each again. The loss is the same.
"""

from typing import Any

import torch
from peft import PeftModel
from torch.utils.checkpoint import checkpoint
from trl.trainer.utils import selective_log_softmax

from resources.training.cpu_sft import only_projects
from resources.training.rows import IGNORED

# Half a gigabyte of float32 logits with 128,000 tokens.
PIECE = 1024


class CompletionLogits:
    """Mixed into TRL's CPOTrainer. What it cannot do, the trainer does itself: a model or logits that are spread or changed."""

    _only_projects: bool | None = None

    def concatenated_forward(self: Any, model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """Log-probabilities of chosen and rejected, the mean logits of their tokens, and the chosen tokens' mean loss."""
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        both = self.concatenated_inputs(batch, padding_value=self.pad_token_id, device=self.accelerator.device)
        if self._only_projects is None:
            spread = self.accelerator.num_processes > 1 or self.is_fsdp_enabled or self.is_deepspeed_enabled
            plain = not spread and not self.aux_loss_enabled
            self._only_projects = plain and only_projects(base, both["concatenated_input_ids"][:1])
        if not self._only_projects:
            return super().concatenated_forward(model, batch)  # type: ignore[misc]
        labels = both["concatenated_labels"][:, 1:]
        wanted = labels != IGNORED
        with self.accelerator.autocast():
            hidden = base.base_model(
                input_ids=both["concatenated_input_ids"],
                attention_mask=both["concatenated_attention_mask"],
                use_cache=False,
            ).last_hidden_state[:, :-1]
            log_probabilities, means = _projected(base.get_output_embeddings(), hidden[wanted], labels[wanted])
        row, pairs = wanted.nonzero()[:, 0], len(labels) // 2
        sums = torch.zeros(len(labels), device=hidden.device).index_add(0, row, log_probabilities)
        if self.loss_type in ("ipo", "simpo"):
            sums = sums / wanted.sum(-1)
        chosen = row < pairs
        likelihood = -log_probabilities[chosen].mean() if self.cpo_alpha else sums.new_zeros(())
        return sums[:pairs], sums[pairs:], means[chosen], means[~chosen], likelihood


def _projected(head: torch.nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probability of each token, and the mean of its logits."""
    pieces = list(zip(hidden.split(PIECE), labels.split(PIECE), strict=True))
    if len(pieces) == 1:
        return _of_piece(head, hidden, labels)
    found = [checkpoint(_of_piece, head, *piece, use_reentrant=False) for piece in pieces]
    return torch.cat([each[0] for each in found]), torch.cat([each[1] for each in found])


def _of_piece(head: torch.nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = head(hidden).float()
    return selective_log_softmax(logits, labels), logits.detach().mean(-1)
