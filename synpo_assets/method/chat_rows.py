"""What a cell of a seed row may be: text, or the chat messages of one question and its answer.

A row is one user turn and one assistant turn. A conversation of several turns, a system turn and a tool's turn are refused by name,
because taking one turn out of them would change what was asked: a system prompt is a setting (`initial_policy.system_prompt`), and
a conversation can be split into rows. Messages may be OpenAI's (role, content; content as text parts) or ShareGPT's (from, value),
also as a text that holds their JSON. A row with a part of its question in another column is refused.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import regex

# What others call the roles, in lower case.
ROLES = {"human": "user", "prompter": "user", "developer": "system"}
ROLES |= dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "model"), "assistant")
TEXT_PARTS = ("text", "input_text", "output_text")
# What servers and data sets call the thoughts before an answer.
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
# Columns that Alpaca, Dolly, OpenOrca and their kin put a part of the question in.
PARTS_OF_QUESTIONS = ("input", "context", "system", "system_prompt", "history")
# Spaces without a width, marks of direction and their like are no text by themselves.
VISIBLE = regex.compile(r"[^\s\p{Z}\p{Cc}\p{Cf}\p{Default_Ignorable_Code_Point}]")
SURROGATES = range(0xD800, 0xE000)
# Those of the Arabic block; chats are marked with them (resources/models/chat.py).
NONCHARACTERS = range(0xFDD0, 0xFDF0)


class UnusableCellError(ValueError):
    """What is wrong with a cell, as the end of a sentence that starts with its name."""


def row_text(row: Mapping[str, Any], column: str, name: str, role: str) -> str:
    """The text in a column of a row, called by a name where it cannot be used.

    Raises:
        UnusableCellError: It holds no such text.
    """
    if not row:
        raise UnusableCellError("the line is no JSON object in UTF-8, or an empty one")
    try:
        return cell_text(row.get(column), role)
    except UnusableCellError as error:
        raise UnusableCellError(f"the {name} {error}") from None


def cell_text(value: Any, role: str) -> str:
    """The text of a cell: itself, or the turn of `role` in chat messages.

    Raises:
        UnusableCellError: It holds no such text.

    Examples:
        >>> cell_text(" Why? ", "user"), cell_text(42, "assistant")
        ('Why?', '42')
        >>> cell_text([{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}], "assistant")
        'Because.'
    """
    if (messages := messages_in(value)) is not None:
        turns = turns_of(messages)
        if role not in turns:
            raise UnusableCellError(f"has no turn of role `{role}`")
        value = turns[role]
    # What JSON and parquet write of tables calls a missing number NaN.
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        raise UnusableCellError("is missing")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UnusableCellError(f"is a {_kind(value)}, where text or chat messages are needed")
    text = str(value).strip()
    if problem := unwritable(text):
        raise UnusableCellError(problem)
    if not VISIBLE.search(text):
        raise UnusableCellError("is empty")
    return text


def messages_in(value: Any) -> Sequence[Any] | None:
    """The chat messages in a cell, also where it holds them as JSON; None if it holds something else.

    Examples:
        >>> messages_in('[{"role": "user", "content": "Why?"}]'), messages_in("[1] is a footnote.")
        ([{'role': 'user', 'content': 'Why?'}], None)
    """
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            read = json.loads(value)
        except (ValueError, RecursionError):
            return None
        return read if all(isinstance(each, dict) and each.keys() & {"role", "from"} for each in read) else None
    return value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else None


def unwritable(text: str) -> str | None:
    r"""What no file or tokenizer takes in a text, if there is something, as the end of a sentence that starts with the text's name.

    Examples:
        >>> unwritable("A party \ud83d"), unwritable("fine \U0001f389")
        ('holds half of a surrogate pair (U+D83D), which is no character', None)
    """
    for letter in text:
        if ord(letter) in SURROGATES:
            return f"holds half of a surrogate pair (U+{ord(letter):04X}), which is no character"
        if ord(letter) in NONCHARACTERS:
            return f"holds U+{ord(letter):04X}, which is no character"
    if "\ufffd" in text:
        return "holds U+FFFD, which stands where bytes were read in a wrong encoding"
    return "holds the character NUL" if "\0" in text else None


def turns_of(messages: Sequence[Any]) -> dict[str, Any]:
    """The content of each role in chat messages, which have one user turn and one assistant turn at most.

    Raises:
        UnusableCellError: They are no chat messages, or more than a question and its answer.
    """
    turns = dict[str, Any]()
    for message in messages:
        if not isinstance(message, Mapping):
            raise UnusableCellError("is a list, but not of chat messages (objects with role and content)")
        role = message.get("role") or message.get("from")
        role = ROLES.get(str(role).lower(), str(role).lower())
        if not message.keys() & {"content", "value"}:
            known = ", ".join(f"`{name}`" for name in message)
            raise UnusableCellError(f"has a turn of role `{role}` without `content`; it has {known}")
        if message.get("tool_calls") or message.get("function_call"):
            raise UnusableCellError(f"has a turn of role `{role}` that calls a tool: only text can be learned from")
        if thought := next((name for name in THOUGHTS if message.get(name)), None):
            raise UnusableCellError(
                f"has `{thought}` beside the answer, which would not be trained: leave it out of the rows"
            )
        content = _content(message.get("content") if message.get("content") is not None else message.get("value"))
        if role == "system" and not str(content or "").strip():
            continue
        if role == "system":
            raise UnusableCellError(
                "has a system turn: state it once, in initial_policy.system_prompt, and leave it out of the rows"
            )
        if role not in ("user", "assistant"):
            raise UnusableCellError(f"has a turn of role `{role}`, which is neither a question nor an answer")
        if role in turns:
            raise UnusableCellError(f"is a conversation of {len(messages)} turns: a row is one question and its answer")
        if role == "user" and "assistant" in turns:
            raise UnusableCellError("has the answer before the question")
        turns[role] = content
    return turns


def _content(content: Any) -> Any:
    """The content of a message; OpenAI's parts joined where all are text."""
    if not isinstance(content, Sequence) or isinstance(content, str | bytes):
        return content
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    kinds = [part.get("type", "text") if isinstance(part, Mapping) else _kind(part) for part in parts]
    if other := next((kind for kind in kinds if kind not in TEXT_PARTS), None):
        raise UnusableCellError(f"has a part of type `{other}`: only text can be learned from")
    if not all(isinstance(part.get("text"), str) for part in parts):
        raise UnusableCellError("has a part of type `text` without text")
    return "".join(part["text"] for part in parts)


def _kind(value: Any) -> str:
    names = {bool: "truth value", dict: "JSON object", bytes: "byte string"}
    return names.get(type(value), type(value).__name__)
