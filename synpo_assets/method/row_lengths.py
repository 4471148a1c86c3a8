"""Which rows of the seed and which new prompts do not fit into M_0's context, or are changed by its chat template.

The paper takes its seed as given, and says nothing of prompts that are too long.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from synpo_assets.method.templates import (
    Message,
    generator_instruction,
    generator_target,
    improver_instruction,
    user_message,
)

OVER_CONTEXT = "exceed M_0's context of"
SHOWN_CHARACTERS = 80


@dataclasses.dataclass(frozen=True)
class Room:
    """The tokens that M_0 reads and writes at once, and how many of them are written."""

    context: int
    answer: int  # The longest answer to a prompt.
    rewrite: int | None  # The longest rewrite of an answer; None where no improver is trained.
    rewrites_gold: bool = False  # Whether damaged gold is rewritten, too.


def length_problem(row: Mapping[str, Any], room: Room, tokens: Callable[[Sequence[Message]], int]) -> str | None:
    """Which use of a row takes more tokens than there is room for, as a sentence about `it`; None if all fit.

    Args:
        row: A prompt, and the gold answer where it has one.
        tokens: Counts the tokens of chat messages, as they are put to M_0.

    Examples:
        >>> row = {"prompt": "Why? " * 30, "answer": "So."}
        >>> length_problem(row, Room(200, 64, None), lambda messages: sum(len(each["content"]) for each in messages))
        "its prompt takes 150 tokens, which with up to 64 new ones exceed M_0's context of 200"
    """
    for what, read, written in _uses(row, room):
        taken = tokens(read)
        if taken + written > room.context:
            new = f" with up to {written} new ones" if written else ""
            return f"its {what} takes {taken} tokens, which{new} {OVER_CONTEXT} {room.context}"
    return None


def rendering_problem(
    row: Mapping[str, Any], rendered_otherwise: Callable[[Sequence[Message], str], str | None]
) -> str | None:
    """Which text that M_0 learns to write for a row its chat template changes, as a sentence about `it`; None if it changes none.

    Templates of models that think leave out what stands before `</think>`, say.

    Args:
        row: A prompt, and the gold answer where it has one.
        rendered_otherwise: What the template makes of an answer to chat messages; None if it stands there as it is.
    """
    prompt, gold = row["prompt"], row.get("answer")
    if not gold:
        return None
    uses = {
        "answer": (user_message(prompt), gold),
        "prompt with its answer": (generator_instruction([]), generator_target(prompt, gold)),
    }
    for what, (asked, written) in uses.items():
        if (made := rendered_otherwise(asked, written)) is not None:
            return f"the chat template of M_0 renders its {what} otherwise, as {made[-SHOWN_CHARACTERS:]!r}"
    return None


def has_room(prompt: str, room: Room, tokens: Callable[[Sequence[Message]], int]) -> bool:
    """Whether a prompt that a model wrote fits with its answer, and where an improver is trained with the rewrite of that.

    Examples:
        >>> def letters(messages):
        ...     return sum(len(each["content"]) for each in messages)
        >>> [has_room("Why? " * count, Room(200, 64, None), letters) for count in (20, 30)]
        [True, False]
    """
    uses = [(user_message(prompt), room.answer)]
    if room.rewrite is not None:
        uses.append((improver_instruction(prompt, ""), room.answer + room.rewrite))
    return all(tokens(read) + written <= room.context for read, written in uses)


def _uses(row: Mapping[str, Any], room: Room) -> Iterator[tuple[str, list[Message], int]]:
    """What is read of a row and how much is written after it, the most telling first."""
    prompt, gold = row["prompt"], row.get("answer", "")
    yield "prompt", user_message(prompt), room.answer
    if gold:
        yield "prompt with its answer", [*user_message(prompt), {"role": "assistant", "content": gold}], 0
    if gold and room.rewrite is not None:
        yield "prompt in the improver's template", improver_instruction(prompt, ""), room.answer + room.rewrite
        if room.rewrites_gold:
            yield "answer in the improver's template", improver_instruction(prompt, gold), room.rewrite
