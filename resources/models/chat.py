"""The one place that turns chat messages into token ids: chat template applied once, exactly one BOS at most.

Only the template writes control tokens. Where a message or an answer spells one (`<|im_end|>` in a question about chat models,
`</s>` in HTML), it is tokenized as the text that it is: else a seed row could close its own turn and forge another.
"""

import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from resources.common.errors import FinalError
from resources.common.text import one_line
from resources.models.bounded import OutOfBoundsError, within_time

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
# What a template is tried with.
QUESTION, ANSWER = "question", "answer"
ASKED = [{"role": "user", "content": QUESTION}]
ANSWERED = [*ASKED, {"role": "assistant", "content": ANSWER}]
# Around the number of a control token that is text: noncharacters, which no text may hold.
OPEN, CLOSE = "\ufdd0", "\ufdd1"


class ChatTemplateError(FinalError):
    """The tokenizer has no chat template, or one that cannot be used; the message says what to do."""


class RenderingError(ChatTemplateError):
    """A chat template fails on a conversation.

    Attributes:
        reason: What it said, on one line.
    """

    def __init__(self, error: Exception, directory: str) -> None:
        from jinja2.exceptions import TemplateError

        said = one_line(str(error), 200).rstrip(".")
        self.reason = said if isinstance(error, TemplateError) else f"{type(error).__name__}: {said}"
        super().__init__(
            f"The chat template of {directory} fails on a conversation: {self.reason}. Correct its chat_template.jinja, or choose "
            "another model."
        )


def load_tokenizer(directory: str, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer of a model directory and checks that it can render chats."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    if not tokenizer.chat_template:
        raise ChatTemplateError(
            f"The tokenizer in {directory} has no chat template: name an instruct model, or add a chat_template.jinja to the "
            "directory."
        )
    if tokenizer.eos_token is None and tokenizer.pad_token is None:
        raise ChatTemplateError(
            f"The tokenizer in {directory} has neither an eos_token nor a pad_token: name one in its tokenizer_config.json."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def prompt_text(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> str:
    """Renders messages up to the point where the assistant starts to write.

    The text starts with one BOS if the template writes it or the tokenizer would add it, and never with two.
    """
    return turns_text(tokenizer, messages, add_generation_prompt=True)


def turns_text(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], add_generation_prompt: bool = False
) -> str:
    """Renders messages as the template does, with one BOS at most."""
    text = as_rendered(tokenizer, messages, add_generation_prompt)
    bos = tokenizer.bos_token
    adds_bos = bos is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    return bos + text if adds_bos and not text.startswith(bos) else text


def as_rendered(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], add_generation_prompt: bool = False
) -> str:
    """Renders messages as the template does.

    Raises:
        ChatTemplateError: The template does not end, or fails.
    """
    try:
        with within_time():
            return str(
                tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
    except OutOfBoundsError as error:
        raise ChatTemplateError(
            f"The chat template of {tokenizer.name_or_path} {error} on a conversation that begins with "
            f"{messages[0]['content'][:60]!r}: correct its chat_template.jinja, or choose another model."
        ) from None
    # A template may compute anything.
    except Exception as error:
        raise RenderingError(error, tokenizer.name_or_path) from None


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> list[int]:
    """Token ids of `prompt_text`, where control tokens are the template's alone."""
    return _token_ids(tokenizer, _marked_prompt(tokenizer, messages))


def answer_ids(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], answer: str, finished: bool = True
) -> list[int]:
    """Token ids of an assistant's answer as they follow `prompt_ids`; one that was cut has no end-of-turn token.

    Prompt and answer are tokenized together, because some tokenizers begin a text on its own differently, and with the space
    that the template puts between them.
    """
    before, end = _around_answers(tokenizer, str(tokenizer.chat_template))
    prompt, answer = _marked_prompt(tokenizer, messages), before + _marked(tokenizer, answer)
    asked, whole = _token_ids(tokenizer, prompt), _token_ids(tokenizer, prompt + answer)
    together = whole[: len(asked)] == asked
    token_ids = whole[len(asked) :] if together else _token_ids(tokenizer, answer)
    return [*token_ids, end] if finished else token_ids


def rendered_otherwise(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], answer: str) -> str | None:
    """What a chat template makes of an answer that it does not render as it stands; None if it does."""
    try:
        before, _ = _around_answers(tokenizer, str(tokenizer.chat_template))
        prompt = prompt_text(tokenizer, messages)
        whole = turns_text(tokenizer, [*messages, {"role": "assistant", "content": answer}])
    except RenderingError as error:
        return error.reason
    return None if whole.startswith(prompt + before + answer) else whole.removeprefix(prompt)


def _marked_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> str:
    """`prompt_text` with marks in place of the control tokens that messages spell."""
    return prompt_text(tokenizer, [{**turn, "content": _marked(tokenizer, turn["content"])} for turn in messages])


def _marked(tokenizer: "PreTrainedTokenizerBase", text: str) -> str:
    control, pattern = _control_tokens(tokenizer)
    return pattern.sub(lambda match: f"{OPEN}{control.index(match[0])}{CLOSE}", text) if control else text


def _token_ids(tokenizer: "PreTrainedTokenizerBase", marked: str) -> list[int]:
    ids, (control, _) = list[int](), _control_tokens(tokenizer)
    # The odd parts are the numbers of control tokens that are text.
    for place, part in enumerate(re.split(f"{OPEN}(\\d+){CLOSE}", marked)):
        text = control[int(part)] if place % 2 else part
        if text:
            ids += tokenizer(text, add_special_tokens=False, split_special_tokens=bool(place % 2)).input_ids
    return ids


@functools.lru_cache(maxsize=8)
def _control_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[tuple[str, ...], re.Pattern[str]]:
    """The texts of all control tokens, and what finds them: longer ones first, so that none is taken for another's beginning."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    control = tuple(sorted(added | set(tokenizer.all_special_tokens), key=lambda token: (-len(token), token)))
    return control, re.compile("|".join(map(re.escape, control)))


def end_of_turn_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token that closes an assistant's turn in the chat template; the EOS token if the template writes none."""
    return _around_answers(tokenizer, str(tokenizer.chat_template))[1]


@functools.lru_cache(maxsize=8)
def _around_answers(tokenizer: "PreTrainedTokenizerBase", _template: str) -> tuple[str, int]:
    """The space that the template puts between a prompt and its answer, and the token that closes the answer."""
    before, _, after = turns_text(tokenizer, ANSWERED).rpartition(ANSWER)
    between = before.removeprefix(prompt_text(tokenizer, ASKED))
    closing = tokenizer(after.strip(), add_special_tokens=False).input_ids
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    end = closing[0] if closing and closing[0] in special else tokenizer.eos_token_id
    if end is None:
        raise ChatTemplateError(
            f"The chat template of {tokenizer.name_or_path} closes an answer with no control token, and its tokenizer has no "
            "eos_token, so no answer would end: name one in its tokenizer_config.json."
        )
    return ("" if between.strip() else between), end
