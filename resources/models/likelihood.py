"""How likely a model finds given answers: their log-probability, without writing anything."""

import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from resources.common.progress import Progress
from resources.models.batches import longest_first
from resources.models.chat import answer_ids, load_tokenizer, prompt_ids
from resources.models.device import DeviceResource, loading_options, memory_explained, prepare_device
from resources.storage.checkpoint_store import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("synpo.models")

# A batch's logits are as many numbers as it has tokens times the vocabulary: about 1 GB for one of 128,000.
MOST_TOKENS = 2048


@dataclasses.dataclass(frozen=True)
class Likelihoods:
    """The log-probabilities of answers, and what they cost."""

    per_token: list[float]  # Per row the mean over the tokens of the answer's text, without the end of turn, in nats.
    end: list[float]  # Per row that of the end-of-turn token alone, after the text.
    tokens: int
    seconds: float


class AnswerLikelihood(DeviceResource):
    """Computes log-probabilities of answers with transformers, since a forward pass is all that it takes."""

    def measure(self, checkpoint: Checkpoint, rows: Sequence[tuple[str, str]]) -> Likelihoods:
        """The log-probabilities of each answer, given its prompt as one user turn; no answer may be empty."""
        from transformers import AutoModelForCausalLM

        started = time.monotonic()
        device, trusted = prepare_device(self.engine), self.engine.trust_remote_code
        tokenizer = load_tokenizer(checkpoint.weights, trusted)
        model = AutoModelForCausalLM.from_pretrained(checkpoint.weights, **loading_options(self.engine))
        model = model.to(device).eval()
        asked = [[{"role": "user", "content": prompt}] for prompt, _ in rows]
        sides = [
            (prompt_ids(tokenizer, messages), answer_ids(tokenizer, messages, answer))
            for messages, (_, answer) in zip(asked, rows, strict=True)
        ]
        lengths = [len(prompt) + len(answer) for prompt, answer in sides]
        found = [(0.0, 0.0)] * len(rows)
        with Progress(len(rows), "likelihoods", logger) as progress:
            for places in longest_first(lengths, min(self.engine.batch_tokens, MOST_TOKENS)):
                with memory_explained(f"a batch of {len(places)} answers to read", "Lower engine.batch_tokens."):
                    measured = _log_probabilities(model, tokenizer, [sides[place] for place in places])
                for place, of_text_and_end in zip(places, measured, strict=True):
                    found[place] = of_text_and_end
                progress.add(len(places), sum(lengths[place] for place in places))
        per_token, end = ([values[part] for values in found] for part in (0, 1))
        return Likelihoods(per_token, end, sum(lengths), time.monotonic() - started)


def _log_probabilities(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch: Sequence[tuple[list[int], list[int]]]
) -> list[tuple[float, float]]:
    """Of each answer after its prompt: the mean log-probability of the tokens of its text, and that of its last token."""
    import torch

    token_ids = {"input_ids": [prompt + answer for prompt, answer in batch]}
    padded = tokenizer.pad(token_ids, padding_side="right", return_tensors="pt").to(model.device)
    found = []
    with torch.inference_mode():
        logits = model(**padded).logits
        for row, (prompt, answer) in enumerate(batch):
            start, end = len(prompt), len(prompt) + len(answer)
            # What stands at a place is predicted at the place before.
            predicted = logits[row, start - 1 : end - 1].float().log_softmax(dim=-1)
            written = padded["input_ids"][row, start:end].unsqueeze(-1)
            of_tokens = predicted.gather(-1, written).squeeze(-1)
            found.append((float(of_tokens[:-1].mean()), float(of_tokens[-1])))
    return found
