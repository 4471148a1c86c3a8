"""The chat template of M_0: what the settings state is written into it, and whether it renders what is trained is tried.

In the template it reaches generation, training, scoring and whoever loads a model of the experiment later, alike.
"""

import datetime
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from upath import UPath

from resources.models.bounded import OutOfBoundsError, within_bounds
from resources.models.chat import (
    ANSWER,
    ANSWERED,
    ASKED,
    QUESTION,
    ChatTemplateError,
    Message,
    RenderingError,
    answer_ids,
    as_rendered,
    load_tokenizer,
    prompt_ids,
    prompt_text,
    turns_text,
)
from resources.settings.data import InitialPolicy
from resources.storage.files import set_aside, temporary_directory_beside

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_FILE = "chat_template.jinja"
LONGEST_RENDERED = 200_000
LONG_QUESTION = "question " * 2000
DATE_FORMAT = re.compile(r"strftime_now\(\s*([\"'])(.*?)\1\s*\)")


def with_stated_template(directory: Path, source: InitialPolicy, folder: Path, trust_remote_code: bool) -> Path:
    """A directory with the same model, whose template holds what the settings state; the same one if they state nothing.

    Args:
        folder: Where the new directory is made.

    Raises:
        ChatTemplateError: The template does not end, or shows no system turn.
    """
    tokenizer = load_tokenizer(str(directory), trust_remote_code)
    template = tokenizer.get_chat_template()
    stated = "".join(_stated(source, template))
    _refuse_endless(tokenizer, stated + template, directory)
    if not stated:
        return directory
    # Of files that were added since, or are gone, the links would not know.
    files = sorted(file.name for file in directory.iterdir())
    named = hashlib.sha256(json.dumps([str(directory.absolute()), template, stated, files]).encode()).hexdigest()[:12]
    place = folder / f"{directory.name}-{named}"
    if place.exists():
        if (place / TEMPLATE_FILE).is_file() and (place / TEMPLATE_FILE).read_bytes() == (stated + template).encode():
            return place
        set_aside(UPath(place))
    with temporary_directory_beside(place) as temporary:
        for file in directory.iterdir():
            if file.name != TEMPLATE_FILE:
                (temporary / file.name).symlink_to(file.absolute())
        (temporary / TEMPLATE_FILE).write_text(stated + template, encoding="utf-8")
        if source.system_prompt is not None:
            _refuse_hidden_system_turn(temporary, directory, source.system_prompt, trust_remote_code)
        try:
            temporary.rename(place)
        except OSError:
            # Another process made the same meanwhile.
            if not place.exists():
                raise
    return place


def refuse_other_text(directory: Path, trust_remote_code: bool) -> None:
    """Raises a sentence if a conversation is rendered otherwise than a prompt to answer with the answer after it.

    The second is what is trained and generated, the first is what whoever uses the model renders.
    """
    tokenizer = load_tokenizer(str(directory), trust_remote_code)
    try:
        whole = turns_text(tokenizer, ANSWERED)
    except RenderingError as error:
        raise ChatTemplateError(
            f"The chat template of {directory} renders no question with its answer: {error.reason}. Correct its "
            "chat_template.jinja, or state what it asks for in initial_policy.system_prompt or initial_policy.template_arguments."
        ) from None
    closing, prompt = whole.rpartition(ANSWER)[2], prompt_text(tokenizer, ASKED)
    trained = prompt_ids(tokenizer, ASKED) + answer_ids(tokenizer, ASKED, ANSWER)
    rendered = tokenizer(whole, add_special_tokens=False).input_ids
    bos, problem = tokenizer.bos_token, None
    own = as_rendered(tokenizer, ASKED)
    # In SmolLM2's the BOS token opens every turn.
    if bos and bos in own and (own.startswith(bos + bos) or not own.startswith(bos)):
        problem = f"it writes {bos} elsewhere than once at the start"
    elif rendered[: len(trained) - 1] != trained[:-1] or whole.removeprefix(prompt).count(ANSWER) > 1:
        problem = f"a prompt is {prompt[-60:]!r}, but the answered one is {whole[-90:]!r}"
    elif closing.strip() and len(rendered) >= len(trained) and rendered[len(trained) - 1] != trained[-1]:
        end = tokenizer.decode(trained[-1])
        problem = f"it closes an answer with {closing[:40]!r}, which does not begin with the control token {end}"
    if problem:
        raise ChatTemplateError(
            f"The chat template of {directory} renders other text than would be trained: {problem}. State what the template asks "
            "for in initial_policy.template_arguments (such as `enable_thinking: false`), or correct its chat_template.jinja."
        )


def _refuse_endless(tokenizer: "PreTrainedTokenizerBase", template: str, directory: Path) -> None:
    """Tries every kind of chat that is rendered later, when nothing bounds what a template takes of memory."""
    system, answer = {"role": "system", "content": "system"}, ANSWERED[-1]
    questions = ({"role": "user", "content": text} for text in (QUESTION, LONG_QUESTION))
    kinds = list(itertools.product(([], [system]), questions, ([], [answer]), (False, True)))

    def is_small() -> bool:
        return all(
            _rendered_length(tokenizer, template, [*before, asked, *after], opens) <= LONGEST_RENDERED
            for before, asked, after, opens in kinds
        )

    try:
        within_bounds(is_small)
    except OutOfBoundsError as error:
        raise ChatTemplateError(
            f"The chat template of {directory} {error} on a conversation of a few words or of {len(LONG_QUESTION):,} letters: "
            "correct its chat_template.jinja, or choose another initial_policy."
        ) from None


def _rendered_length(
    tokenizer: "PreTrainedTokenizerBase", template: str, chat: list[Message], add_generation_prompt: bool
) -> int:
    """The letters of a chat; 0 if the template fails on it, which is said of those chats that there are."""
    try:
        return len(
            str(
                tokenizer.apply_chat_template(
                    chat, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        )
    except MemoryError:
        raise
    except Exception:
        return 0


def _stated(source: InitialPolicy, template: str) -> Iterator[str]:
    """What is put before a template: variables, the date, the system turn."""
    for name, value in source.template_arguments.items():
        yield f"{{%- set {name} = {_literal(value)} -%}}"
    if "strftime_now" in template:
        # Else prompts change at midnight: other answers of M_0 and M_t, and finished ones are not found again.
        yield _fixed_date(datetime.date.fromisoformat(source.template_date), template)
    if source.system_prompt is not None:
        turn = f"[{{'role': 'system', 'content': {_literal(source.system_prompt)}}}]"
        yield f"{{% if messages[0]['role'] != 'system' %}}{{% set messages = {turn} + messages %}}{{% endif %}}"


def _fixed_date(date: datetime.date, template: str) -> str:
    """A macro in place of the function that gives today's date."""
    formats = dict.fromkeys(match[2] for match in DATE_FORMAT.finditer(template))
    cases = "".join(f"{{%- if form == {_literal(form)} -%}}{date.strftime(form)}{{%- endif -%}}" for form in formats)
    return f"{{%- macro strftime_now(form) -%}}{cases}{{%- endmacro -%}}"


def _literal(value: object) -> str:
    """A value as Jinja writes it."""
    return json.dumps(value, ensure_ascii=False)


def _refuse_hidden_system_turn(changed: Path, directory: Path, text: str, trust_remote_code: bool) -> None:
    try:
        shown = prompt_text(load_tokenizer(str(changed), trust_remote_code), ASKED)
        reason = None if text.strip() in shown else "it does not show it"
    except RenderingError as error:
        reason = error.reason
    if reason is not None:
        raise ChatTemplateError(
            f"The chat template of {directory} takes no system turn ({reason}): remove initial_policy.system_prompt."
        )
