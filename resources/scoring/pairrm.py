"""The network of PairRM: DeBERTa that reads a prompt and two answers at once, and a small head on three of its tokens.

The layout and the names of the weights are those of the published model (https://huggingface.co/llm-blender/PairRM-hf),
whose own definition is https://github.com/yuchenlin/LLM-Blender/blob/main/llm_blender/pair_ranker/pairrm.py. The package
llm-blender does not import with transformers 5.
"""

from typing import ClassVar

import torch
from transformers import DebertaV2Config, DebertaV2Model
from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2PreTrainedModel


class PairRM(DebertaV2PreTrainedModel):
    """DeBERTa with a head that is asked twice: once about the prompt and the first answer, once about the second."""

    # In bfloat16 two scores near 4 differ by a multiple of 0.03, which is coarse beside a threshold of 0.2.
    _keep_in_fp32_modules_strict: ClassVar = ["head_layer"]

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__(config)
        self.pretrained_model = DebertaV2Model(config)
        self.head_layer = torch.nn.Sequential(
            torch.nn.Dropout(config.drop_out),
            torch.nn.Linear(2 * config.hidden_size, config.hidden_size),
            torch.nn.Tanh(),
            torch.nn.Dropout(config.drop_out),
            torch.nn.Linear(config.hidden_size, config.n_tasks),
        )
        self.post_init()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
        """Scores both answers of each row; the logit that the first one is better is the difference.

        Args:
            input_ids: Token ids, of shape (rows, length).
            attention_mask: 1 for tokens and 0 for padding, of shape (rows, length).
            marks: Places of the tokens that open prompt, first and second answer, of shape (rows, 3).

        Returns:
            A float32 tensor of shape (rows, 2): the first answer's score and the second's.
        """
        encoded = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        rows = torch.arange(len(marks), device=marks.device).unsqueeze(1)
        prompt, first, second = encoded[rows, marks].float().unbind(dim=1)
        scores = [self.head_layer(torch.cat([prompt, answer], dim=-1)).mean(dim=-1) for answer in (first, second)]
        return torch.stack(scores, dim=-1)
