"""The place that a reward model's head reads, and the number format that it reads it in: the same in training and in use.

transformers reads a sequence classifier at the last token that is not `pad_token_id` of the model's config. Rows padded
with another token are then read off their padding. If the pad token also closes a turn, as in SmolLM2 and zephyr, the end of
turn is never read. TRL and transformers hold the head in the number format of the other weights; in bfloat16 its small
updates vanish, and scores near 4 are multiples of 0.03.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from resources.models.chat import end_of_turn_id
from resources.models.weights import weight_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HEAD = "score"


class Float32Linear(torch.nn.Linear):
    """A linear layer that computes in float32, whatever the number format of its input and of the layers around it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Outputs in float32, also where autocast is on."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


def new_head(model: "PreTrainedModel") -> None:
    """Gives a classifier a head in float32, drawn at random, in place of the one that its loading drew."""
    text = model.config.get_text_config()
    head = Float32Linear(text.hidden_size, model.config.num_labels, bias=False)
    torch.nn.init.normal_(head.weight, std=text.initializer_range)
    setattr(model, HEAD, head.to(model.device))


def read_head(model: "PreTrainedModel", weights: str) -> None:
    """Reads the head again from its file, for loading rounds it to the number format of the other weights.

    A model whose head is not one linear layer called `score` is left as it is.
    """
    if not isinstance(getattr(model, HEAD, None), torch.nn.Linear):
        return
    for file in weight_files(Path(weights)):
        with safe_open(file, "pt") as tensors:
            parts = {
                name.rpartition(".")[2]: tensors.get_tensor(name).float()
                for name in tensors.keys()  # noqa: SIM118
                if name.startswith(f"{HEAD}.")
            }
        if parts:
            outputs, inputs = parts["weight"].shape
            head = Float32Linear(inputs, outputs, bias="bias" in parts)
            head.load_state_dict(parts)
            setattr(model, HEAD, head.to(model.device))


def padding_id(config: "PretrainedConfig", tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token that a classifier's rows are padded with, which is stated in its config from then on.

    A config that names one has been trained with it, so it stays. Else it is a token that closes no turn.
    """
    text = config.get_text_config()
    if text.pad_token_id is None or not 0 <= text.pad_token_id < text.vocab_size:
        text.pad_token_id = silent_id(tokenizer)
    return text.pad_token_id


def silent_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """A token that no row ends with: the pad token, unless it also closes turns, else another special token.

    Where there is no other, it is the last of the vocabulary.
    """
    closing = {end_of_turn_id(tokenizer), tokenizer.eos_token_id}
    special = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids]
    others = [token_id for token_id in special if token_id is not None and token_id not in closing]
    return others[0] if others else max(set(range(len(tokenizer))) - closing)


def padded(rows: Sequence[Sequence[int]], padding: int) -> dict[str, torch.Tensor]:
    """Rows of token ids as one batch, padded at their ends, with the mask that leaves the padding out."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, padding)
    lengths = torch.tensor([len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}
