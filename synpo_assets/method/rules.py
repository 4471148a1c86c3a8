"""Rules of which a program says whether an answer meets them; names and rules are our own, the idea is IFEval's.

They are meant for answers in any language: marks of other scripts count as their Latin ones do, and in scripts without spaces each
character is a word.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import polars as pl
import regex

from synpo_assets.method.words import SPACED, STOPS, UNSPACED_CHARACTER, UNSPACED_STOPS

CONSTRAINTS = pl.List(pl.Struct({"rule": pl.String, "value": pl.String}))
# A number with more digits is no count of words or lines.
MOST_DIGITS = 6
# No instruction states a longer one; to look for it may take as many steps as its length times that of the answer.
LONGEST_TEXT = 1_000
NUMBERED = re.compile(rf"\s*(\d{{1,{MOST_DIGITS}}})(?:[.)]\s|[\u3001\uff0e\uff09])")
DASHED = re.compile(r"\s*[-\u2013\u2014]\s*[^\s\-\u2013\u2014]")
# A full stop after these, or between their letters, ends no sentence.
ABBREVIATION = re.compile(r"\b(?:Dr|Mr|Mrs|Ms|Prof|St|vs|e\.g|i\.e)\.", re.IGNORECASE)
FENCE = "```"
QUESTION_MARKS, COMMAS = "?\u061f\uff1f", ",\u060c\u3001\uff0c"
OPENING, CLOSING = '"\u201c\u201e\u00ab\u00bb\u300c\u300e', '"\u201d\u201c\u00bb\u00ab\u300d\u300f'
# A run of marks is entered at its first one, so that long runs take no longer than other text.
SENTENCE_END = re.compile(
    rf"(?<![{STOPS}])[{STOPS}]+[\"'”\u2019)\]\u00bb]*(?=\s|$)|[{UNSPACED_STOPS}]+[\"'”\u2019)\]\u300d\u300f\uff09]*"
)
# What makes a text part of a longer word where it stands beside it.
BESIDE = rf"[\w{SPACED}"


def meets(rule: str, value: str, answer: str) -> bool:
    """Whether an answer meets one constraint: a rule of `RULES`, and the value it compares with where it compares.

    Examples:
        >>> meets("words_at_most", "3", "Only three words"), meets("dashes_exactly", "2", "- one")
        (True, False)
        >>> meets("avoids", "sand", "A sandy beach"), meets("ends_with", "the end", "So it was. The End.")
        (True, True)
    """
    return bool(answer.strip()) and RULES[rule](answer.strip(), value)


def followed(constraints: Sequence[Mapping[str, str]], answer: str) -> list[bool]:
    """Whether an answer meets each constraint of its prompt."""
    return [meets(constraint["rule"], constraint["value"], answer) for constraint in constraints]


def rules_text(constraints: Sequence[Mapping[str, str]]) -> str:
    """Constraints as the prompt generator writes them, JSON in one line; nothing if there are none.

    Examples:
        >>> rules_text([{"rule": "words_at_most", "value": "20"}, {"rule": "all_lowercase", "value": ""}])
        '[{"rule": "words_at_most", "value": "20"}, {"rule": "all_lowercase"}]'
    """
    stated = [{name: text for name, text in constraint.items() if text} for constraint in constraints]
    return json.dumps(stated, ensure_ascii=False) if stated else ""


def constraints_problem(stated: Any) -> str | None:
    """What is wrong with constraints as written, if anything is.

    Examples:
        >>> constraints_problem([{"rule": "words_at_most", "value": "a few"}])
        "the rule `words_at_most` needs a whole number as value, not 'a few'"
    """
    if not isinstance(stated, list):
        return "`constraints` is no list"
    return next(filter(None, map(_problem, stated)), None)


def read_constraints(stated: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Constraints in which nothing is wrong, in the form of the tables."""
    return [{"rule": each["rule"], "value": _read_value(each["rule"], each.get("value"))} for each in stated]


def _read_value(rule: str, value: Any) -> str:
    """A value without blanks around it, and around what stands between its bars; a text to avoid may be one."""
    if rule in ALONE:
        return ""
    if rule == "avoids_text":
        return str(value)
    parts = str(value).split("|") if rule in LISTING else [str(value)]
    return "|".join(part.strip() for part in parts)


def _problem(constraint: Any) -> str | None:
    """What is wrong with a constraint as written, if anything is."""
    if not isinstance(constraint, Mapping) or not isinstance(constraint.get("rule"), str):
        return "a constraint is no object with a `rule`"
    rule, value = constraint["rule"], constraint.get("value")
    if rule not in RULES:
        return f"there is no rule `{rule}`"
    digits = str(value)
    if rule in COUNTING and not (digits.isascii() and digits.isdecimal() and len(digits) <= MOST_DIGITS):
        return f"the rule `{rule}` needs a whole number as value, not {value!r}"
    # A text with half of a surrogate pair, which JSON can spell, fits in no table.
    if rule in COMPARING and not (
        isinstance(value, str | int) and _read_value(rule, value) and str(value).isprintable()
    ):
        return f"the rule `{rule}` needs a text as value, in one line"
    if rule in COMPARING and len(str(value)) > LONGEST_TEXT:
        return f"the value of the rule `{rule}` is longer than {LONGEST_TEXT:,} characters"
    return None


def words_in(answer: str) -> list[str]:
    """The words that rules count: characters of scripts without spaces, else what stands between spaces and is no mark alone."""
    spaced = UNSPACED_CHARACTER.sub(r" \g<0> ", answer)
    return [word for word in spaced.split() if any(letter.isalnum() for letter in word)]


def _sentences(answer: str) -> int:
    """How many sentences there are; a last one without an end mark counts."""
    parts = SENTENCE_END.split(ABBREVIATION.sub("abbreviation", answer))
    return len([part for part in parts if any(letter.isalnum() for letter in part)])


def _whole(text: str) -> str:
    """The pattern of a text with no letter or digit beside one of its own; characters of scripts without spaces may stand there."""
    before = rf"(?<!{BESIDE})" if regex.match(BESIDE, text, regex.VERSION1) else ""
    after = rf"(?!{BESIDE})" if regex.search(rf"{BESIDE}$", text, regex.VERSION1) else ""
    return f"{before}{regex.escape(text)}{after}"


def _find_word(answer: str, text: str, start: int = 0) -> regex.Match[str] | None:
    return regex.search(_whole(text), answer, regex.IGNORECASE | regex.VERSION1, pos=start)


def _has_word(answer: str, text: str) -> bool:
    return _find_word(answer, text) is not None


def _lines(answer: str) -> list[str]:
    return [line for line in answer.splitlines() if line.strip()]


def _count(answer: str, marks: str) -> int:
    return sum(map(answer.count, marks))


def _json(answer: str) -> Any:
    """The value of an answer that is JSON and nothing else, if only in a fence; None of any other."""
    if len(answer) > 2 * len(FENCE) and answer.startswith(FENCE) and answer.endswith(FENCE):
        answer = answer.removeprefix(FENCE).removesuffix(FENCE).removeprefix("json").strip()
    try:
        return json.loads(answer)
    except (ValueError, RecursionError):
        return None


def _is_list_of(answer: str, count: str) -> bool:
    listed = _json(answer)
    return isinstance(listed, list) and len(listed) == int(count)


def _has_key(answer: str, key: str) -> bool:
    stated = _json(answer)
    return isinstance(stated, dict) and key in stated


def _is_numbered(answer: str, count: str) -> bool:
    """Whether the lines that start with a number are numbered from 1 to a count, and nothing else."""
    numbers = [int(line[1]) for line in map(NUMBERED.match, _lines(answer)) if line]
    return numbers == list(range(1, int(count) + 1))


def _in_order(answer: str, texts: str) -> bool:
    """Whether texts, written with bars between them, all stand in an answer, each after the one before."""
    place = 0
    for text in texts.split("|"):
        found = _find_word(answer, text, place)
        if found is None:
            return False
        place = found.end()
    return True


def _bare(text: str) -> str:
    """In lowercase, without quotes and marks around it."""
    return text.lower().strip(f"{STOPS}{UNSPACED_STOPS}{OPENING}{CLOSING}\u00a1\u00bf'\u2018\u2019* \n")


def _is_bare(answer: str, text: str) -> bool:
    return _bare(answer) == _bare(text) if _bare(text) else answer == text


def _starts_with(answer: str, text: str) -> bool:
    if not _bare(text):
        return answer.startswith(text)
    return regex.match(_whole(_bare(text)), _bare(answer), regex.VERSION1) is not None


def _ends_with(answer: str, text: str) -> bool:
    if not _bare(text):
        return answer.endswith(text)
    return regex.search(rf"{_whole(_bare(text))}$", _bare(answer), regex.VERSION1) is not None


COUNTING: dict[str, Callable[[str, str], bool]] = {
    "words_at_most": lambda answer, value: len(words_in(answer)) <= int(value),
    "words_at_least": lambda answer, value: len(words_in(answer)) >= int(value),
    "sentences_at_most": lambda answer, value: _sentences(answer) <= int(value),
    "lines_exactly": lambda answer, value: len(_lines(answer)) == int(value),
    "dashes_exactly": lambda answer, value: len([x for x in _lines(answer) if DASHED.match(x)]) == int(value),
    "numbered_exactly": _is_numbered,
    "comma_items_exactly": lambda answer, value: len(_lines(answer)) == 1 and _count(answer, COMMAS) == int(value) - 1,
    "json_list_of": _is_list_of,
    "question_marks_exactly": lambda answer, value: _count(answer, QUESTION_MARKS) == int(value),
}
COMPARING: dict[str, Callable[[str, str], bool]] = {
    "contains": _has_word,
    "avoids": lambda answer, value: not _has_word(answer, value),
    "avoids_text": lambda answer, value: value not in answer,
    "starts_with": _starts_with,
    "ends_with": _ends_with,
    "in_order": _in_order,
    "is_one_of": lambda answer, value: any(_is_bare(answer, each) for each in value.split("|")),
    "json_object_with": _has_key,
}
ALONE: dict[str, Callable[[str, str], bool]] = {
    "all_lowercase": lambda answer, _: answer == answer.lower(),
    "all_uppercase": lambda answer, _: answer == answer.upper() and any(letter.isalpha() for letter in answer),
    "in_quotes": lambda answer, _: len(answer) > 2 and answer[0] in OPENING and answer[-1] in CLOSING,
}
# Of these, the ones whose value is several texts with bars between them.
LISTING = ("in_order", "is_one_of")
# By name: whether an answer meets it, given the value that it is compared with.
RULES = COUNTING | COMPARING | ALONE
