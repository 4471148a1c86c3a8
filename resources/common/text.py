"""Texts for people: names of assets, times, and generated text shown as what it is."""

import unicodedata

# What some scripts need beside letters: soft hyphens, spaces without a width, joiners, and marks of direction.
WRITTEN = "\u00ad\u061c\u200b\u200c\u200d\u200e\u200f"
CONTROLS = {"Cc", "Cf", "Cs", "Zl", "Zp"}
UNITS_OF_TIME = ((1, "s"), (60, "min"), (3600, "h"))


def asset_label(asset: str, partition: str | None) -> str:
    """How people name an asset of an iteration, or one that is made once.

    Examples:
        >>> asset_label("model_checkpoint", "0001"), asset_label("seed_pairs", None)
        ('model_checkpoint[0001]', 'seed_pairs')
    """
    return f"{asset}[{partition}]" if partition else asset


def labelled(label: str) -> tuple[str, str | None]:
    """The asset and iteration that a label names, the inverse of `asset_label`.

    Examples:
        >>> labelled("model_checkpoint[0001]"), labelled("seed_pairs")
        (('model_checkpoint', '0001'), ('seed_pairs', None))
    """
    asset, _, partition = label.removesuffix("]").partition("[")
    return asset, partition or None


def duration(seconds: float) -> str:
    """A time in the unit that suits it.

    Examples:
        >>> [duration(seconds) for seconds in (0.4, 89, 150, 5400, 11000, 3e5)]
        ['0.4 s', '89 s', '2.5 min', '90 min', '3.1 h', '83 h']
    """
    length, unit = next(each for each in UNITS_OF_TIME if seconds < 120 * each[0] or each is UNITS_OF_TIME[-1])
    value = seconds / length
    return f"{value:.1f} {unit}" if value < 10 and round(value, 1) % 1 else f"{value:,.0f} {unit}"


def visible(text: str) -> str:
    r"""A text with its control characters shown as their numbers; line ends and tabs stay.

    A model may write escape sequences that recolour a terminal, or marks that turn the order of letters around.

    Examples:
        >>> visible("\x1b[31mred\x00 \u202eevil")
        '⟨U+001B⟩[31mred⟨U+0000⟩ ⟨U+202E⟩evil'
    """
    return "".join(f"⟨U+{ord(letter):04X}⟩" if _is_hidden(letter) else letter for letter in text)


def one_line(text: str, most: int = 1000) -> str:
    r"""What a file or a library says, on one line of a sentence, which is cut after so many characters.

    Examples:
        >>> one_line("no key\n  `a`", 99), one_line("no key\n  `a`", 6)
        ('no key `a`', 'no key…')
    """
    line = " ".join(text.split())
    return visible(line[:most]) + ("…" if len(line) > most else "")


def _is_hidden(letter: str) -> bool:
    return unicodedata.category(letter) in CONTROLS and letter not in f"\n\t{WRITTEN}"
