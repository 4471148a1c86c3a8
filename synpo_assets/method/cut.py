"""What becomes of answers that were cut at the token limit: the one treatment, wherever answers are compared.

The paper generates up to 2,048 tokens, so that practically nothing is cut. With a lower limit some answers stop in mid-sentence,
and a reward model that is shown them beside gold learns to see the cut and nothing else. So whatever is compared must not
tell a cut answer from one that ended, except by what it says:

- An answer that was cut is trimmed to its last whole sentence when it enters a table, and from then on closed like any other.
  So the improver, the scorer and the judge read it, in training and in use.
- A pair with a side that was cut is dropped, with the reason `cut`: likelihood tells a cut from an end, and SimPO would learn
  to end. Of ranked samples, those that were cut take no rank. Where a training's own lengths cut one side, neither is closed.
- An answer without any whole sentence is empty after trimming. It trains neither improver nor scorer, and gets no verdict.
- Lengths are those of the trimmed answers, as the judges read them. Repetition, verifiable rules and benchmarks read the
  answers as they were written: a loop has no sentence to trim to, and trimming could make an answer short enough for a rule.
- Gold is never cut, so its likelihood needs no rule.

`finish_reason` keeps saying which answers were cut, and a check warns where they are many.
"""

import re

import polars as pl

from synpo_assets.method.words import STOPS, UNSPACED_STOPS

# The number of a list's item, which is no sentence; the end of a sentence, with what may close it; or that of a line which
# does not lead on to the next one.
_ENDS = re.compile(
    rf"""^[^\S\n]*(?:\d+|[A-Za-z])[.)](?=\s|$)
    | (?P<whole>
        (?<![{STOPS}\u2026])[{STOPS}\u2026]+["'\u201d\u2019\u00bb)\]*_`]*(?=\s|$)
        | [{UNSPACED_STOPS}]+[\u201d\u2019\u300d\u300f\uff09]*
        | (?<=[^\s:,;\u2013-])(?=[^\S\n]*\n)
    )""",
    re.VERBOSE | re.MULTILINE,
)


def whole_sentences(text: str) -> str:
    r"""The text up to its last whole sentence or line; empty if it has none.

    Examples:
        >>> whole_sentences("Tea is hot. It is made of lea")
        'Tea is hot.'
        >>> whole_sentences("You need:\n1. Tea\n2. Wat")
        'You need:\n1. Tea'
        >>> whole_sentences("No end in si")
        ''
    """
    ends = _sentence_ends(text)
    return text[: ends[-1]] if ends else ""


def first_half(text: str) -> str:
    """The first half of a text's sentences or lines, at least one: an answer of which only the form is shortened.

    Empty if there is nothing to leave out.

    Examples:
        >>> first_half("Tea is hot. It is made of leaves. Drink it.")
        'Tea is hot. It is made of leaves.'
        >>> first_half("Tea is hot.")
        ''
    """
    ends = _sentence_ends(text)
    if not ends or ends[-1] < len(text.rstrip()):
        ends.append(len(text))
    return text[: ends[(len(ends) - 1) // 2]] if len(ends) > 1 else ""


def whole_answers(completions: pl.DataFrame) -> pl.Series:
    """The answers of completions (columns text, finish_reason): stripped, and trimmed where they were cut."""
    trimmed = pl.col("text").map_elements(whole_sentences, return_dtype=pl.String)
    whole = pl.when(pl.col("finish_reason") == "length").then(trimmed).otherwise("text")
    return completions.select(response=whole.str.strip_chars())["response"]


def _sentence_ends(text: str) -> list[int]:
    return [match.end() for match in _ENDS.finditer(text) if match["whole"] is not None]
