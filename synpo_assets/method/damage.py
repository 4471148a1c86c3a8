"""Answers made worse in one known way, by their text alone (not in the paper).

A judge that has seen gold only beside M_0's answers learns what M_0 writes like, and one that has seen it beside cut answers
learns what a cut looks like. Here gold itself is made worse: it keeps its style, and it ends as before, so that neither
tells the two apart. Each damage is deterministic under a seed, and whether it applies to a text does not depend on the seed.
"""

import itertools
import random
import re
from collections.abc import Callable, Mapping, Sequence

import regex

from synpo_assets.method.words import PART, STOPS, UNSPACED_STOPS

# A number with more digits is neither an item's nor one to change.
MARKER = re.compile(r"[^\S\n]*(?:[-*•]|(\d{1,15})[.)])\s+")
# Before a letter that is not small, for which scripts without capitals have no other; where no spaces are written, before any.
SENTENCE_END = regex.compile(
    rf"(?<=[{STOPS}])(?P<quote>[\"')\]\u201d\u2019\u00bb]*)(?P<gap> +)(?=[\"'(\[\u201c\u00ab]?[\p{{Lu}}\p{{Lt}}\p{{Lo}}\p{{N}}])"
    rf"|(?<=[{UNSPACED_STOPS}])(?P<quote>[\u201d\u2019\u300d\u300f\uff09]*)(?P<gap> *)(?=\S)"
)
ASKED = ("!", "?", "\u061f", "\uff01", "\uff1f")
FULL_STOPS = (".", "\u3002", "\u0964", "\u06d4", "\u1362", "\uff61")
NUMBER = re.compile(r"(?<![\w.])\d{1,15}(?!\w)")
WORD = re.compile(r"(?<!\w)[^\W\d_]{4,}(?!\w)")
FEWEST_WORDS = 3
# The parts of a text that may be exchanged are its first ones: there are as many pairs as the square of them.
MOST_SWAPPED = 200


def lost_item(text: str, _other: str, draw: random.Random) -> str | None:
    r"""Leaves out one item of a list, or one sentence; the items that are left are numbered anew.

    Examples:
        >>> damaged("lost_item", "1. Boil water\n2. Add tea\n3. Wait", "", seed=0)
        '1. Boil water\n2. Add tea'
    """
    parts, gaps = parts_of(text)
    last = len(parts) - 1
    places = [place for place in range(last + 1) if place < last or (last and ending(parts[-2]) == ending(text))]
    if last < 1 or not places:
        return None
    place = draw.choice(places)
    # The numbers stay where they are, and the last one of the list goes.
    while place < last and (here := _numbered(parts[place])) and (following := _numbered(parts[place + 1])):
        parts[place] = f"{here[0]}{parts[place + 1][following.end() :]}"
        place += 1
    return _joined([*parts[:place], *parts[place + 1 :]], ["", *[*gaps[:place], *gaps[place + 1 :]][1:]])


def shortened(text: str, _other: str, _draw: random.Random) -> str | None:
    """Keeps the first half of the items or sentences, or fewer.

    Examples:
        >>> damaged("shortened", "It rains. It pours. It snows. It melts.", "", seed=0)
        'It rains. It pours.'
    """
    parts, gaps = parts_of(text)
    kept = next((count for count in range(len(parts) // 2, 0, -1) if ending(parts[count - 1]) == ending(text)), None)
    return None if kept is None else _joined(parts[:kept], gaps)


def repeated_item(text: str, _other: str, draw: random.Random) -> str | None:
    r"""Says one item or sentence twice.

    Examples:
        >>> damaged("repeated_item", "1. Boil water", "", seed=0)
        '1. Boil water\n2. Boil water'
    """
    parts, gaps = parts_of(text)
    if not parts:
        return None
    place = draw.randrange(len(parts))
    return _joined(_renumbered([*parts[: place + 1], *parts[place:]]), _with_one_more(gaps, place, parts))


def changed_number(text: str, _other: str, draw: random.Random) -> str | None:
    """Writes another number of as many digits in the place of one, but leaves the numbers of list items alone.

    Examples:
        >>> damaged("changed_number", "1. Wait 20 minutes", "", seed=0)
        '1. Wait 98 minutes'
    """
    markers = {match.start(1) for line in _lines(text) if (match := MARKER.match(text, line)) and match[1]}
    numbers = [match for match in NUMBER.finditer(text) if match.start() not in markers]
    if not numbers:
        return None
    number = draw.choice(numbers)
    least = 10 ** (len(number[0]) - 1) if len(number[0]) > 1 else 0
    # One of the values is left out, so the draw is from one fewer.
    value = draw.randrange(least, 10 ** len(number[0]) - 1)
    value += value >= int(number[0]) >= least
    return f"{text[: number.start()]}{value}{text[number.end() :]}"


def swapped_order(text: str, _other: str, draw: random.Random) -> str | None:
    r"""Exchanges two sentences, or two items of a list whose order means something: numbered ones, or with numbers in each.

    Examples:
        >>> damaged("swapped_order", "1. Boil water\n2. Drink it", "", seed=0)
        '1. Drink it\n2. Boil water'
        >>> damaged("swapped_order", "- apples\n- pears", "", seed=0) is None
        True
    """
    parts, gaps = parts_of(text)
    if any(map(MARKER.match, parts)) and not all(re.search(r"\d", part) for part in parts):
        return None
    bare = [_unmarked(part) for part in parts]
    pairs = [
        (one, other)
        for one, other in itertools.combinations(range(min(len(parts), MOST_SWAPPED)), 2)
        if bare[one] != bare[other] and (other < len(parts) - 1 or ending(parts[one]) == ending(text))
    ]
    if not pairs:
        return None
    one, other = draw.choice(pairs)
    parts[one], parts[other] = parts[other], parts[one]
    return _joined(_renumbered(parts), gaps)


def _unmarked(part: str) -> str:
    """Without the mark of an item at its start."""
    match = MARKER.match(part)
    return part[match.end() :] if match else part


def off_topic_sentence(text: str, other: str, draw: random.Random) -> str | None:
    r"""Puts an item or sentence of another answer among those of this one, but not at the end.

    Examples:
        >>> damaged("off_topic_sentence", "- apples\n- pears", "Pay your rent on time.", seed=0)
        '- apples\n- Pay your rent on time\n- pears'
    """
    parts, gaps = parts_of(text)
    bare = [_unmarked(part).strip() for part in parts_of(other)[0]]
    foreign = [part for part in bare if len(PART.findall(part)) >= FEWEST_WORDS and part not in text]
    if not parts or not foreign:
        return None
    place, added = draw.randrange(len(parts)), draw.choice(foreign)
    match = MARKER.match(parts[place])
    # Among items it is an item that ends as they do, and among sentences a sentence.
    full = next((ending(part) for part in (parts[place], text) if ending(part) in FULL_STOPS), ".")
    stop = full if match is None or ending(parts[place]) == full else ""
    added = f"{match[0] if match else ''}{added.rstrip(''.join(FULL_STOPS))}{'' if ending(added) in ASKED else stop}"
    return _joined(_renumbered([*parts[:place], added, *parts[place:]]), _with_one_more(gaps, place, parts))


def swapped_words(text: str, _other: str, draw: random.Random) -> str | None:
    """Exchanges two different words of four letters or more.

    Examples:
        >>> damaged("swapped_words", "Paris is in France.", "", seed=0)
        'France is in Paris.'
    """
    words = list(WORD.finditer(text))
    if len({word[0].lower() for word in words}) < 2:
        return None
    one = draw.choice(words)
    other = draw.choice([word for word in words if word[0].lower() != one[0].lower()])
    first, second = sorted((one, other), key=re.Match.start)
    between = text[first.end() : second.start()]
    ends = text[: first.start()], text[second.end() :]
    return f"{ends[0]}{_cased(second[0], first[0])}{between}{_cased(first[0], second[0])}{ends[1]}"


Damage = Callable[[str, str, random.Random], str | None]
DAMAGES: Mapping[str, Damage] = {
    damage.__name__: damage
    for damage in (
        lost_item, shortened, repeated_item, changed_number, swapped_order, off_topic_sentence, swapped_words,
    )
}  # fmt: skip


def damaged(name: str, text: str, other: str, seed: int) -> str | None:
    """A text with one damage; None if it does not apply.

    Args:
        name: The damage, a name in `DAMAGES`.
        other: An answer to another prompt, for what is off topic.
        seed: Draws where the damage is done; the same for equal texts.
    """
    found = DAMAGES[name](text, other, random.Random(f"{seed}:{name}:{text}"))
    return found if found is not None and found != text and ending(found) == ending(text) else None


def all_damages(text: str, other: str, seed: int) -> dict[str, str]:
    """A text with each damage that applies to it, by name; the arguments are those of `damaged`.

    Examples:
        >>> list(all_damages("Yes.", "", seed=0))
        ['repeated_item']
    """
    found = {name: damaged(name, text, other, seed) for name in DAMAGES}
    return {name: worse for name, worse in found.items() if worse is not None}


def ending(text: str) -> str:
    """How a text ends: its last character, where all letters and digits count as one.

    Examples:
        >>> ending("Done. "), ending("- pears"), ending("- 7 plums")
        ('.', 'a', 'a')
    """
    last = text.rstrip()[-1:]
    return "a" if last.isalnum() else last


def parts_of(text: str) -> tuple[list[str], list[str]]:
    r"""The items or sentences of a text, and what stands before each: lines if there are several or it is an item.

    Examples:
        >>> parts_of("It rains. It pours.")
        (['It rains.', 'It pours.'], ['', ' '])
        >>> parts_of("First:\n\n- one\n- two")
        (['First:', '- one', '- two'], ['', '\n\n', '\n'])
    """
    lines = re.split(r"(\n\s*\n|\n)", text.strip("\n"))
    if len(lines) > 1 or MARKER.match(lines[0]):
        return lines[::2], ["", *lines[1::2]]
    marked = SENTENCE_END.sub(lambda match: f"{match['quote']}\n{match['gap']}\n", lines[0])
    parts = marked.split("\n")
    return ([], []) if not text.strip() else (parts[::2], ["", *parts[1::2]])


def _numbered(part: str) -> re.Match[str] | None:
    match = MARKER.match(part)
    return match if match and match[1] else None


def _joined(parts: Sequence[str], gaps: Sequence[str]) -> str:
    return "".join(f"{gap}{part}" for gap, part in zip(gaps, parts, strict=False))


def _with_one_more(gaps: Sequence[str], place: int, parts: Sequence[str]) -> list[str]:
    """What stands before each part once another one stands at a place: the new gap is like those around it."""
    default = "\n" if MARKER.match(parts[0]) else "" if ending(parts[0]) in tuple(UNSPACED_STOPS) else " "
    gap = gaps[place + 1] if place + 1 < len(gaps) else gaps[place] or default
    return [*gaps[: place + 1], gap, *gaps[place + 1 :]]


def _renumbered(parts: Sequence[str]) -> list[str]:
    """Counts numbered items anew, those of each list from the lowest number among them."""
    renumbered = list[str]()
    for is_numbered, group in itertools.groupby(parts, lambda part: _numbered(part) is not None):
        items = list(group)
        if is_numbered:
            found = [match for item in items if (match := _numbered(item))]
            counted = itertools.count(min(int(match[1]) for match in found))
            items = [
                f"{item[: match.start(1)]}{next(counted)}{item[match.end(1) :]}"
                for item, match in zip(items, found, strict=True)
            ]
        renumbered += items
    return renumbered


def _lines(text: str) -> list[int]:
    """Where lines begin."""
    return [0, *(match.end() for match in re.finditer("\n", text))]


def _cased(word: str, place: str) -> str:
    """A word with a capital where the one had it in whose place it stands."""
    return word[0].upper() + word[1:] if place[0].isupper() else word[0].lower() + word[1:]
