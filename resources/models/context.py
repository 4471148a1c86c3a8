"""How many tokens a model reads and writes at once, and how many of them a chat takes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resources.models.chat import Message, answer_ids, load_tokenizer, prompt_ids, rendered_otherwise


def text_config(weights: str | Path, trust_remote_code: bool) -> Any:
    """The config of a model, or of its part that reads and writes text."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(weights, trust_remote_code=trust_remote_code).get_text_config()


def context_length(config: Any) -> int | None:
    """Tokens that a model with this config holds; None if it states no limit, as where positions are distances."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


class ModelContext:
    """The context of a model, of which nothing but config and tokenizer is loaded.

    Attributes:
        length: Tokens that it holds; None if its config states no limit.
    """

    def __init__(self, weights: str, trust_remote_code: bool) -> None:
        self.length = context_length(text_config(weights, trust_remote_code))
        self._tokenizer = load_tokenizer(weights, trust_remote_code)

    def tokens(self, messages: Sequence[Message]) -> int:
        """The tokens of a chat: of a prompt to answer, or of one with its answer."""
        if messages[-1]["role"] != "assistant":
            return len(prompt_ids(self._tokenizer, messages))
        asked, answer = messages[:-1], messages[-1]["content"]
        return len(prompt_ids(self._tokenizer, asked)) + len(answer_ids(self._tokenizer, asked, answer))

    def rendered_otherwise(self, messages: Sequence[Message], answer: str) -> str | None:
        """What the chat template makes of an answer that it does not render as it stands; None if it does."""
        return rendered_otherwise(self._tokenizer, messages, answer)
