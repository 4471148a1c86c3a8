"""The one place that turns chat messages into token ids: chat template applied once, exactly one BOS at most."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from resources.common.errors import FinalError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]


class ChatTemplateError(FinalError):
    """The tokenizer has no chat template; the message says how to give it one."""


def load_tokenizer(directory: str, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer of a model directory and checks that it can render chats."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    if not tokenizer.chat_template:
        raise ChatTemplateError(
            f"The tokenizer in {directory} has no chat template. SynPO starts from an instruct model: "
            "choose one in initial_policy, or add a chat_template.jinja to the directory."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def prompt_text(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> str:
    """Renders messages up to the point where the assistant starts to write.

    The text starts with one BOS if the template writes it or the tokenizer would add it, and never with two.
    Tokenize it with `add_special_tokens=False`.
    """
    text = str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
    bos = tokenizer.bos_token
    adds_bos = bos is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    return bos + text if adds_bos and not text.startswith(bos) else text


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> list[int]:
    """Token ids of `prompt_text`."""
    return tokenizer(prompt_text(tokenizer, messages), add_special_tokens=False).input_ids


def answer_ids(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], answer: str, finished: bool = True
) -> list[int]:
    """Token ids of an assistant's answer as they follow `prompt_ids`; one that was cut has no end-of-turn token.

    Prompt and answer are tokenized together, because some tokenizers begin a text on its own differently.
    """
    prompt = prompt_text(tokenizer, messages)
    asked = tokenizer(prompt, add_special_tokens=False).input_ids
    whole = tokenizer(prompt + answer, add_special_tokens=False).input_ids
    together = whole[: len(asked)] == asked
    token_ids = whole[len(asked) :] if together else tokenizer(answer, add_special_tokens=False).input_ids
    return [*token_ids, end_of_turn_id(tokenizer)] if finished else token_ids


def end_of_turn_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token that closes an assistant's turn in the chat template; the EOS token if the template writes none."""
    marker = "answer"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": marker}]
    rendered = str(tokenizer.apply_chat_template(turns, tokenize=False))
    after = tokenizer(rendered.rpartition(marker)[2].strip(), add_special_tokens=False).input_ids
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return after[0] if after and after[0] in special else tokenizer.eos_token_id
