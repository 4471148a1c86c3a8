"""Whether a prompt says what a rule asks: G may write a rule that its own question does not state.

Not in the paper, whose prompts have no rules. An answer can follow such a rule only by chance, and a pair in which the chosen one
does teaches chance. What is compared is words: a number or text of the rule stands in the prompt, or, for a rule without a value,
words that name it. A text that shall be contained or avoided must be named as such, in quotation marks or after a word like
"mention": nearly every question holds words of its own subject. The words are English; in other languages rules are taken on trust.
"""

import re
from collections.abc import Mapping

from synpo_assets.method.rules import COUNTING

NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
WITHOUT_CAPITALS = r"\b(?:no|none|not|never|without|avoid\w*|don't)\b[^.?!]*\bcapital"
# What names a rule: one without a value altogether, one about JSON besides its keys.
NAMED_BY = {
    "all_lowercase": re.compile(rf"\blower[- ]?cas|\bsmall letter|{WITHOUT_CAPITALS}"),
    "all_uppercase": re.compile(
        rf"(?s)^(?!.*{WITHOUT_CAPITALS}).*\b(?:upper[- ]?cas|block (?:letter|capital)|capital letter|all[- ]caps|(?:in|only|all) "
        r"capitals|to a capital)"
    ),
    "in_quotes": re.compile(r"\bquot(?:e[sd]?|ing|ations?)\b"),
    "json_object_with": re.compile(r"\bjson\b"),
}
# Rules about a text, and what stands before a text that is meant as one.
NAMING_TEXTS = ("contains", "avoids", "avoids_text", "starts_with", "ends_with")
NAMES_A_TEXT = re.compile(
    r"""(?:["'\u2018-\u201f\u00ab\u00bb]|\b(?:words?|phrase|mention\w*|includ\w*|contain\w*|avoid\w*|with|without|us(?:e|ing))\s+(?:the\s+)?)$"""
)


def is_stated(prompt: str, constraint: Mapping[str, str]) -> bool:
    """Whether a prompt names what a constraint asks.

    Examples:
        >>> is_stated("Name three fruits.", {"rule": "dashes_exactly", "value": "3"})
        True
        >>> is_stated("Tell me about chains.", {"rule": "words_at_most", "value": "3"})
        False
        >>> is_stated("Is it wet? Say yes or no.", {"rule": "is_one_of", "value": "yes|no"})
        True
        >>> [is_stated(prompt, {"rule": "contains", "value": "sea"}) for prompt in ("Why is the sea salty?", "Mention the sea.")]
        [False, True]
        >>> [is_stated(prompt, {"rule": "all_uppercase", "value": ""}) for prompt in ("The capital of Peru?", "In capitals: hello")]
        [False, True]
    """
    said, rule, value = prompt.lower(), constraint["rule"], constraint["value"]
    if rule in NAMED_BY and not NAMED_BY[rule].search(said):
        return False
    if rule in COUNTING:
        names = [str(int(value)), *NUMBERS[int(value) : int(value) + 1]]
        return any(_places(name, said) for name in names)
    if rule in NAMING_TEXTS:
        return any(NAMES_A_TEXT.search(said[:place]) for place in _places(value.lower(), said))
    return all(_places(part.lower(), said) for part in value.split("|") if part)


def _places(text: str, said: str) -> list[int]:
    """Where a text stands as whole words."""
    return [match.start() for match in re.finditer(rf"(?<!\w){re.escape(text)}(?!\w)", said)]
