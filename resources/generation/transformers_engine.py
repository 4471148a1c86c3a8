"""Generation with Hugging Face transformers: one batch at a time, runs anywhere."""

import functools
import itertools
import logging
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING

from resources.common.progress import Progress
from resources.generation.completions import completion, end_ids, longest_sequence
from resources.generation.engine import Completion, Request, Requests
from resources.generation.few_rows import multiply_few_rows_faster
from resources.models.chat import load_tokenizer
from resources.models.context import context_length
from resources.models.device import loading_options, memory_explained, prepare_device
from resources.settings.machine import Engine
from resources.settings.method import Sampling

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache

logger = logging.getLogger("synpo.generation")

# Tokens after which finished rows leave their batch.
PIECE = 16
# Odd, so that no two steps and no two tokens have the same number.
STEP, TOKEN = -0x61C8864680B583EB, -0x3C6EF372FE94F82B


class TransformersEngine:
    """A loaded model that completes requests."""

    def __init__(self, weights: str, engine: Engine) -> None:
        from transformers import AutoModelForCausalLM, GenerationConfig

        device = prepare_device(engine)
        self._batch_tokens = engine.batch_tokens
        self._tokenizer = load_tokenizer(weights, engine.trust_remote_code)
        self._model = AutoModelForCausalLM.from_pretrained(weights, **loading_options(engine)).to(device)
        self._model.eval()
        multiply_few_rows_faster(self._model)
        self._end_ids = end_ids(self._tokenizer, self._model.generation_config.eos_token_id)
        # A model may bring a repetition penalty and other habits; the settings state all there is.
        self._model.generation_config = GenerationConfig()

    @property
    def context_length(self) -> int | None:
        """The most tokens, prompt and completion together, that the model can attend to; None if its config states no limit."""
        return context_length(self._model.config)

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

        from resources.generation.growing_cache import growing_cache

        device = self._model.device
        texts = [request.token_ids for request in batch]
        padded = self._tokenizer.pad({"input_ids": texts}, padding_side="left", return_tensors="pt").to(device)
        written, mask, cache = padded["input_ids"], padded["attention_mask"], growing_cache(self._model.config)
        asked, most = written.shape[1], sampling.max_new_tokens
        seeds = torch.tensor([request.seed for request in batch], device=device)
        ends = torch.tensor(self._end_ids, device=device)
        waiting, finished, write = list(batch), dict[int, Completion](), self._writer(cache)
        # A batch may take minutes on a CPU, and only then its completions are counted.
        with Progress(most, f"tokens at most, of {len(batch)} answers each", logger) as progress:
            while waiting:
                sampler, left = RowSampler(sampling, seeds, asked, progress), most - (written.shape[1] - asked)
                with torch.inference_mode():
                    written = write(
                        input_ids=written,
                        attention_mask=mask,
                        logits_processor=[sampler],
                        max_new_tokens=min(PIECE, left),
                    )
                last = written.shape[1] - asked >= most
                # A stop text shows in the decoded text alone; without one, only what has ended is decoded. transformers would
                # look in prompts too, and fill up an answer that goes on.
                ended = torch.isin(written[:, asked:], ends).any(-1)
                for row in range(len(waiting)) if last or sampling.stop else ended.nonzero().flatten().tolist():
                    key, length, tokens = waiting[row].key, len(waiting[row].token_ids), written[row, asked:].tolist()
                    made = completion(key, length, tokens, sampling, self._tokenizer, self._end_ids)
                    if last or made.finish_reason == "stop":
                        finished[key] = made
                kept = [row for row, request in enumerate(waiting) if request.key not in finished]
                if len(kept) < len(waiting):
                    waiting, rows = [waiting[row] for row in kept], torch.tensor(kept, device=device, dtype=torch.long)
                    cache.reorder_cache(rows)
                    written, mask, seeds = written[rows], mask[rows], seeds[rows]
                mask = torch.nn.functional.pad(mask, (0, written.shape[1] - mask.shape[1]), value=1)
        return [finished[request.key] for request in batch]

    def _writer(self, cache: "DynamicCache") -> "Callable[..., torch.Tensor]":
        """What writes on: texts padded on the right; the cache holds all of their tokens but the last."""
        return functools.partial(
            self._model.generate,
            past_key_values=cache,
            # Sampling is done by a processor, which gives every row its own random stream.
            do_sample=False,
            temperature=None,
            top_k=None,
            top_p=None,
            eos_token_id=self._end_ids,
            pad_token_id=self._tokenizer.pad_token_id,
        )


class RowSampler:
    """Samples each row by random numbers of its own, so that a completion does not depend on the batch it was in.

    Adding Gumbel noise to log-probabilities and taking the largest is the same as sampling from them
    (https://arxiv.org/abs/1411.0030, section 2); greedy decoding then takes the largest.

    Args:
        seeds: The seed of each row, integers of 64 bits on the device of the model.
        asked: The length of the prompts with their padding, where writing begins.
    """

    def __init__(self, sampling: Sampling, seeds: "torch.Tensor", asked: int, progress: Progress) -> None:
        self._sampling, self._seeds, self._asked, self._progress = sampling, seeds, asked, progress

    def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        """Returns scores of shape (rows, vocabulary) whose largest entry in each row is the sampled token."""
        import torch

        self._progress.add(1, len(scores))
        if self._sampling.temperature == 0:
            return scores
        values = scores.float() / self._sampling.temperature
        if self._sampling.top_k or self._sampling.top_p < 1:
            width = self._sampling.top_k or values.shape[-1]
            values, tokens = torch.topk(values, min(width, values.shape[-1]))
        else:
            tokens = torch.arange(values.shape[-1], device=values.device)
        if self._sampling.top_p < 1:
            probabilities = values.softmax(-1)
            left_out = probabilities.cumsum(-1) - probabilities >= self._sampling.top_p
            # What no row keeps needs no random number.
            kept = int((~left_out).sum(-1).max())
            values, tokens = values.masked_fill(left_out, float("-inf"))[:, :kept], tokens[:, :kept]
        uniform = uniform_numbers(self._seeds, input_ids.shape[1] - self._asked, tokens)
        best = (values - torch.log(-torch.log(uniform))).argmax(-1, keepdim=True)
        chosen = tokens.expand(values.shape).gather(-1, best)
        return torch.full_like(scores, float("-inf")).scatter_(-1, chosen, 0.0)


def uniform_numbers(seeds: "torch.Tensor", step: int, tokens: "torch.Tensor") -> "torch.Tensor":
    """A number in (0, 1) for each row and token: a function of seed, step and token alone, the same on every device.

    Args:
        seeds: Integers of 64 bits, of shape (rows).
        step: How many tokens were written before.
        tokens: Ids of tokens, of shape (rows, tokens) or (tokens).
    """
    # Python's integers do not wrap around at 64 bits, as those of tensors do.
    begun = (step * STEP + (1 << 63)) % (1 << 64) - (1 << 63)
    mixed = _mixed(_mixed(seeds + begun).unsqueeze(-1) + tokens * TOKEN)
    # So many bits, and half a step more, are exact in float32, and neither 0 nor 1.
    return ((mixed & (1 << 23) - 1).float() + 0.5) / (1 << 23)


def _mixed(numbers: "torch.Tensor") -> "torch.Tensor":
    """Each bit of the result depends on all bits: the last step of SplitMix64 (https://doi.org/10.1145/2714064.2660195)."""
    # A shift fills in the sign, which is masked away.
    numbers = (numbers ^ (numbers >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    numbers = (numbers ^ (numbers >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return numbers ^ (numbers >> 31 & (1 << 33) - 1)
