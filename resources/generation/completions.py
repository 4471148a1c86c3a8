"""Where a completion ends and what its text is: the same for every engine that gives token ids."""

import bisect
from collections.abc import Sequence
from typing import TYPE_CHECKING

from resources.common.errors import FinalError
from resources.generation.engine import Completion, Requests
from resources.models.chat import end_of_turn_id
from resources.settings.method import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def end_ids(tokenizer: "PreTrainedTokenizerBase", configured: int | list[int] | None) -> list[int]:
    """All tokens that end a completion; `configured` is `eos_token_id` of the model's generation config."""
    named = configured if isinstance(configured, list) else [configured]
    return sorted({*named, tokenizer.eos_token_id, end_of_turn_id(tokenizer)} - {None})


def completion(
    key: int,
    input_tokens: int,
    token_ids: list[int],
    sampling: Sampling,
    tokenizer: "PreTrainedTokenizerBase",
    ends: Sequence[int],
) -> Completion:
    """Makes a completion of the tokens that a model wrote; what follows the first of `ends`, or a stop text, does not count."""
    end = next((place for place, token in enumerate(token_ids) if token in ends), None)
    kept = token_ids if end is None else token_ids[: end + 1]
    text = tokenizer.decode(kept, skip_special_tokens=True)
    stopped = any(stop in text for stop in sampling.stop)
    if stopped:
        for stop in sampling.stop:
            if stop in text:
                text = text[: text.index(stop) + len(stop)]

        def has_all(length: int) -> bool:
            return tokenizer.decode(kept[:length], skip_special_tokens=True).startswith(text)

        # The token that completes the stop text is the last one, as vLLM counts.
        kept = kept[: bisect.bisect_left(range(len(kept)), True, key=has_all)]
    return Completion(
        key=key,
        text=text,
        input_tokens=input_tokens,
        output_tokens=len(kept),
        finish_reason="length" if end is None and not stopped else "stop",
    )


def longest_sequence(requests: Requests, sampling: Sampling, context_length: int | None) -> int:
    """The most tokens that a prompt and its completion can have together, which must not exceed the model's context, if any."""
    if context_length is not None and requests.longest + sampling.max_new_tokens > context_length:
        raise FinalError(
            f"A prompt of {requests.longest} tokens and max_new_tokens = {sampling.max_new_tokens} exceed the model's "
            f"context of {context_length} tokens: lower sampling.max_new_tokens or shorten the prompts."
        )
    return requests.longest + sampling.max_new_tokens
