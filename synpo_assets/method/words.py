"""Words, in every script: what limits, n-grams, repetition and overlaps count.

In scripts that put no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each character with its marks counts as
a word, so that a run of words is a run of characters there. Elsewhere a word is a run of letters with their marks, digits and
underscores: vowel signs of Hindi do not cut it, nor do joiners of Persian and Sinhala or a soft hyphen. Letters are compared as
they look: composed or not, and of half, full or usual width.
"""

import functools
import unicodedata
from typing import TYPE_CHECKING

import regex

if TYPE_CHECKING:
    from budoux import Parser

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
# Combining marks of an unspaced script belong to the character before them.
UNSPACED_CHARACTER = regex.compile(rf"[[{UNSPACED}]--\p{{M}}]\p{{M}}*", regex.VERSION1)
SPACED = rf"--[[{UNSPACED}]--\p{{M}}]]"
WORD = regex.compile(
    rf"{UNSPACED_CHARACTER.pattern}|[[\p{{L}}\p{{N}}_]{SPACED}[[\p{{L}}\p{{M}}\p{{N}}_]{SPACED}*", regex.VERSION1
)
# What spaces part, marks included; in scripts without them, each character.
PART = regex.compile(rf"{UNSPACED_CHARACTER.pattern}|(?:(?!{UNSPACED_CHARACTER.pattern})\S)+", regex.VERSION1)
# The space without a width parts words; other letters without a look stand inside them.
UNSEEN = regex.compile(r"[\p{Cf}--\u200b]", regex.VERSION1)
WIDE = regex.compile(r"[\uff00-\uffef]+")
LETTERS = regex.compile(r"[\p{L}\p{M}]+")
# Ends of sentences, of Devanagari, Arabic, Urdu and Ethiopic too; then of scripts without spaces, where they end one wherever
# they stand.
STOPS, UNSPACED_STOPS = ".!?\u0964\u061f\u06d4\u1362", "\u3002\uff01\uff1f\uff61"
# Parsers that know where words begin, by language.
SEGMENTED = {"zh": "simplified_chinese", "ja": "japanese", "th": "thai"}


def words_of(text: str) -> list[str]:
    r"""The words of a text in lower case.

    Examples:
        >>> words_of("Don't over-mix!"), words_of("हिन्दी भाषा"), words_of("猫はGPT-4が好き")
        (['don', 't', 'over', 'mix'], ['हिन्दी', 'भाषा'], ['猫', 'は', 'gpt', '4', 'が', '好', 'き'])
        >>> words_of("Sonnen\u00adlicht, ＧＰＴ"), words_of("e\u0301t\u00e9") == words_of("\u00e9te\u0301")
        (['sonnenlicht', 'gpt'], True)
    """
    usual = WIDE.sub(lambda wide: unicodedata.normalize("NFKC", wide[0]), UNSEEN.sub("", text))
    return WORD.findall(unicodedata.normalize("NFC", usual).lower())


def segments(text: str, language: str) -> str:
    """A text with spaces between its words where the language has none; other languages as they are.

    Examples:
        >>> segments("太阳能电池板把阳光变成电能。", "zh"), segments("Made of light.", "en")
        ('太阳能 电池 板 把 阳光 变成 电能', 'Made of light.')
    """
    if language not in SEGMENTED:
        return text
    return " ".join(word for phrase in _parser(language).parse(text) for word in LETTERS.findall(phrase))


@functools.cache
def _parser(language: str) -> "Parser":
    import budoux

    return getattr(budoux, f"load_default_{SEGMENTED[language]}_parser")()
