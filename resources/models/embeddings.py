"""Turns texts into sentence embeddings: vectors whose cosine says how alike two texts are."""

import dataclasses
import functools
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from resources.common.progress import Progress
from resources.models.batches import longest_first, tokens_at_a_time
from resources.models.context import context_length
from resources.models.device import DeviceResource, memory_explained, prepare_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("synpo.models")


@dataclasses.dataclass(frozen=True)
class Embedded:
    """The embeddings of texts, and what they cost."""

    vectors: np.ndarray  # float32 of shape (texts, dimensions), each row of length 1.
    tokens: int
    texts_cut: int  # Whose end the model does not read.
    seconds: float


class SentenceEmbedder(DeviceResource):
    """Embeds texts as sentence-transformers does with all-MiniLM-L6-v2: the mean over all tokens, scaled to length 1."""

    def embed(self, weights: Path, texts: Sequence[str]) -> Embedded:
        """Embeds texts, none of which may be empty."""
        import torch
        from transformers import AutoModel, AutoTokenizer

        started = time.monotonic()
        device = prepare_device(self.engine)
        trusted = self.engine.trust_remote_code
        tokenizer = AutoTokenizer.from_pretrained(weights, trust_remote_code=trusted)
        # In bfloat16 the cosine of two texts would have two digits.
        model = AutoModel.from_pretrained(weights, dtype=torch.float32, use_safetensors=True, trust_remote_code=trusted)
        model = model.to(device).eval()
        stated = stated_length(weights)
        longest = min(tokenizer.model_max_length, context_length(model.config) or stated, stated)
        # A text that spells a control token is tokenized as text.
        tokenize = functools.partial(tokenizer, list(texts), split_special_tokens=True)
        cut = sum(len(token_ids) > longest for token_ids in tokenize().input_ids)
        token_ids = tokenize(truncation=True, max_length=longest).input_ids
        vectors = np.zeros((len(texts), model.config.hidden_size), np.float32)
        with Progress(len(texts), "embeddings", logger) as progress:
            for places in longest_first([len(each) for each in token_ids], tokens_at_a_time(self.engine)):
                batch = [token_ids[place] for place in places]
                with memory_explained(f"a batch of {len(batch)} texts to embed", "Lower engine.batch_tokens."):
                    vectors[places] = _mean_vectors(model, tokenizer, batch)
                progress.add(len(batch), sum(map(len, batch)))
        return Embedded(vectors, sum(map(len, token_ids)), cut, time.monotonic() - started)


def _mean_vectors(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch: Sequence[Sequence[int]]
) -> np.ndarray:
    """The mean of the last layer over the tokens of each text, padding left out, scaled to length 1."""
    import torch

    padded = tokenizer.pad({"input_ids": list(batch)}, padding_side="right", return_tensors="pt").to(model.device)
    with torch.inference_mode():
        states = model(**padded).last_hidden_state
        mask = padded["attention_mask"].unsqueeze(-1)
        means = (states * mask).sum(dim=1) / mask.sum(dim=1)
        return torch.nn.functional.normalize(means, dim=1).cpu().numpy()


def stated_length(weights: Path) -> int:
    """The longest text in tokens that sentence-transformers is told to use a model with, which may be shorter than it can."""
    file = weights / "sentence_bert_config.json"
    stated = json.loads(file.read_text()).get("max_seq_length") if file.exists() else None
    return int(stated or 10**9)
