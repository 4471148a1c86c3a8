"""Generation with Hugging Face transformers: one batch at a time, runs anywhere."""

import itertools
import logging
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from resources.common.progress import Progress
from resources.generation.completions import completion, end_ids, longest_sequence
from resources.generation.engine import Completion, Request, Requests
from resources.models.chat import load_tokenizer
from resources.models.device import memory_explained, prepare_device, torch_dtype
from resources.settings.machine import Engine
from resources.settings.method import Sampling

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache

logger = logging.getLogger("synpo.generation")

# Tokens after which finished rows leave their batch.
PIECE = 16


class TransformersEngine:
    """A loaded model that completes requests."""

    def __init__(self, weights: str, engine: Engine) -> None:
        from transformers import AutoModelForCausalLM, GenerationConfig

        device = prepare_device(engine)
        self._batch_tokens = engine.batch_tokens
        self._tokenizer = load_tokenizer(weights, engine.trust_remote_code)
        self._model = AutoModelForCausalLM.from_pretrained(
            weights,
            dtype=torch_dtype(engine),
            use_safetensors=True,
            trust_remote_code=engine.trust_remote_code,
        ).to(device)
        self._model.eval()
        self._end_ids = end_ids(self._tokenizer, self._model.generation_config.eos_token_id)
        # A model may bring a repetition penalty and other habits; the settings state all there is.
        self._model.generation_config = GenerationConfig()

    @property
    def context_length(self) -> int:
        """The most tokens, prompt and completion together, that the model can attend to."""
        return self._model.config.get_text_config().max_position_embeddings

    def generate(self, requests: Requests, sampling: Sampling) -> Generator[list[Completion], None, None]:
        """Completes requests, longest prompts first, which keeps padding small, and yields each batch when it is done."""
        longest_sequence(requests, sampling, self.context_length)
        waiting = iter(requests)
        for first in waiting:
            rows = max(1, self._batch_tokens // (len(first.token_ids) + sampling.max_new_tokens))
            batch = [first, *itertools.islice(waiting, rows - 1)]
            with memory_explained(
                f"a batch of {len(batch)} sequences",
                "Lower engine.batch_tokens or sampling.max_new_tokens. Finished shards are kept: run it again.",
            ):
                completions = self._complete(batch, sampling)
            yield completions

    def _complete(self, batch: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Completes a batch piece by piece, so that a few long answers do not keep the finished ones in the batch."""
        import torch
        from transformers import DynamicCache

        device = self._model.device
        texts = [request.token_ids for request in batch]
        padded = self._tokenizer.pad({"input_ids": texts}, padding_side="left", return_tensors="pt").to(device)
        written, mask, cache = padded["input_ids"], padded["attention_mask"], DynamicCache(config=self._model.config)
        asked, most = written.shape[1], sampling.max_new_tokens
        waiting = {request.key: torch.Generator().manual_seed(request.seed) for request in batch}
        finished = dict[str, Completion]()
        lengths = {request.key: len(request.token_ids) for request in batch}
        # A batch may take minutes on a CPU, and only then its completions are counted.
        with Progress(most, f"tokens at most, of {len(batch)} answers each", logger) as progress:
            while waiting:
                done = written.shape[1] - asked
                written = self._write(
                    written, mask, cache, sampling, RowSampler(sampling, list(waiting.values()), progress),
                    min(PIECE, most - done),
                )  # fmt: skip
                last, left = written.shape[1] - asked >= most, list[int]()
                for row, (key, tokens) in enumerate(zip(waiting, written[:, asked:].tolist(), strict=True)):
                    made = completion(key, lengths[key], tokens, sampling, self._tokenizer, self._end_ids)
                    if last or made.finish_reason == "stop":
                        finished[key] = made
                    else:
                        left.append(row)
                waiting = {key: generator for key, generator in waiting.items() if key not in finished}
                rows = torch.tensor(left, device=device, dtype=torch.long)
                cache.reorder_cache(rows)
                written = written[rows]
                mask = torch.nn.functional.pad(mask[rows], (0, written.shape[1] - mask.shape[1]), value=1)
        return [finished[request.key] for request in batch]

    def _write(
        self,
        texts: "torch.Tensor",
        mask: "torch.Tensor",
        cache: "DynamicCache",
        sampling: Sampling,
        sampler: "RowSampler",
        tokens: int,
    ) -> "torch.Tensor":
        """The texts with so many tokens more at most, padded on the right; the cache holds all of them but the last."""
        import torch

        with torch.inference_mode():
            return self._model.generate(
                input_ids=texts,
                attention_mask=mask,
                past_key_values=cache,
                # Sampling is done by the processor below, which gives every row its own random stream.
                do_sample=False,
                temperature=None,
                top_k=None,
                top_p=None,
                logits_processor=[sampler],
                max_new_tokens=tokens,
                eos_token_id=self._end_ids,
                pad_token_id=self._tokenizer.pad_token_id,
                stop_strings=sampling.stop or None,
                tokenizer=self._tokenizer,
            )


class RowSampler:
    """Samples each row from its own random stream, so that a completion does not depend on the batch it was in.

    Adding Gumbel noise to log-probabilities and taking the largest is the same as sampling from them
    (https://arxiv.org/abs/1411.0030, section 2); greedy decoding then takes the largest.
    """

    def __init__(self, sampling: Sampling, generators: Sequence["torch.Generator"], progress: Progress) -> None:
        self._sampling, self._generators, self._progress = sampling, generators, progress

    def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        """Returns scores of shape (rows, vocabulary) whose largest entry in each row is the sampled token."""
        import torch

        self._progress.add(1, len(scores))
        if self._sampling.temperature == 0:
            return scores
        width = self._sampling.top_k or scores.shape[-1]
        values, tokens = torch.topk(scores.float() / self._sampling.temperature, min(width, scores.shape[-1]))
        if self._sampling.top_p < 1:
            probabilities = values.softmax(-1)
            before = probabilities.cumsum(-1) - probabilities
            values = values.masked_fill(before >= self._sampling.top_p, float("-inf"))
        uniform = torch.stack([torch.rand(values.shape[-1], generator=generator) for generator in self._generators])
        noise = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
        chosen = tokens.gather(-1, (values + noise.to(values.device)).argmax(-1, keepdim=True))
        return torch.full_like(scores, float("-inf")).scatter_(-1, chosen, 0.0)
