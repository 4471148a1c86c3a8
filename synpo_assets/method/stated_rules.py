"""Whether a prompt says what a rule asks: G may write a rule that its own question does not state.

Not in the paper, whose prompts have no rules. An answer can follow such a rule only by chance, and a pair in which the chosen one
does teaches chance. What is compared is words: a number or text of the rule stands in the prompt, or, for a rule without a value, a
word that names it. A text that shall be contained or avoided must be named as such, in quotation marks or after a word like
"mention": nearly every question holds words of its own subject. The words are English; in other languages rules are taken on trust.
"""

import re
from collections.abc import Mapping

from synpo_assets.method.rules import COUNTING

NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
# Of rules without a value: words of which one stands in a prompt that states the rule.
NAMED_BY = {
    "all_lowercase": ("lower", "small letter", "capital"),
    "all_uppercase": ("upper", "capital", "block letter"),
    "in_quotes": ("quot",),
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
    """
    said, rule, value = prompt.lower(), constraint["rule"], constraint["value"]
    if rule in NAMED_BY:
        return any(name in said for name in NAMED_BY[rule])
    if rule in COUNTING:
        names = [str(int(value)), *NUMBERS[int(value) : int(value) + 1]]
        return any(re.search(rf"(?<!\w){name}(?!\w)", said) for name in names)
    if rule in NAMING_TEXTS:
        places = (match.start() for match in re.finditer(re.escape(value.lower()), said))
        return any(NAMES_A_TEXT.search(said[:place]) for place in places)
    return all(part.lower() in said for part in value.split("|"))
