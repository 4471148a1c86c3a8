"""Which synthetic prompts are kept, and drawing what they are written from until there are enough of them.

The paper keeps what parses. We also drop prompts that are too short or long, in another language, near-duplicates
of a seed prompt, of one kept before or of one of an earlier pair, that have the words of a held-out prompt or share a long run of
words with one, or that M_0's context does not hold with what is written after them.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rensa import RMinHash, RMinHashLSH

from synpo_assets.method.stated_rules import is_stated
from synpo_assets.method.templates import parse_question, parse_rules
from synpo_assets.method.words import words_of

Row = dict[str, Any]

SMALLEST_ROUND = 8
ROUND_MARGIN = 1.2

# Texts are compared if they agree in all hashes of a band. Memory grows with the bands, about 100 bytes each per text.
BANDS = 10
BAND_HASHES = range(1, 17)
LEAST_FOUND = 0.5


def ngrams(words: Sequence[str], size: int) -> set[tuple[str, ...]]:
    """All runs of `size` consecutive words; the whole text if it is shorter."""
    size = min(size, len(words))
    return {tuple(words[start : start + size]) for start in range(len(words) - size + 1)} if words else set()


def word_pairs(text: str) -> set[str]:
    """All pairs of consecutive words; a single word by itself."""
    return {" ".join(pair) for pair in ngrams(words_of(text), 2)}


class NearDuplicates:
    """Remembers texts and finds those nearly equal to a new one, by the word pairs they share.

    MinHash proposes the texts to compare with, and their exact similarity decides: a text below the similarity is never
    found, one well above it nearly always, one just at it more often than not.
    """

    def __init__(self, similarity: float) -> None:
        self._similarity = similarity
        # More hashes to a band mean fewer texts to compare with, and fewer found.
        hashes = max((size for size in BAND_HASHES if _share_found(similarity, size) >= LEAST_FOUND), default=1)
        self._hashes = hashes * BANDS
        self._index = RMinHashLSH(similarity, self._hashes, BANDS)
        self._texts: list[str] = []

    def find(self, text: str) -> str | None:
        """An earlier text whose word pairs have at least the set Jaccard similarity, if there is one."""
        mine = word_pairs(text)
        for place in sorted(self._index.query(self._hash(mine))):
            if _jaccard(mine, word_pairs(self._texts[place])) >= self._similarity:
                return self._texts[place]
        return None

    def add(self, text: str) -> None:
        """Remembers a text."""
        self._index.insert(len(self._texts), self._hash(word_pairs(text)))
        self._texts.append(text)

    def _hash(self, pairs: set[str]) -> RMinHash:
        result = RMinHash(self._hashes, seed=0)
        result.update(pairs)
        return result


def _jaccard(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other) if one or other else 1.0


def _share_found(similarity: float, band_hashes: int) -> float:
    """The share of texts with this Jaccard similarity that agree in at least one band."""
    return 1 - (1 - similarity**band_hashes) ** BANDS


class Contamination:
    """Finds prompts that have the words of a held-out prompt, or share a run of `ngram` words with one.

    A held-out prompt with fewer words than that is compared as a whole: "Why?" is no part of another question.

    Examples:
        >>> held_out = Contamination(["Why?", "Name four red fruits, please."], ngram=4)
        >>> [held_out.find(text) for text in ("why", "Why is the sky blue?", "Quick: name four red fruits!")]
        ['Why?', None, 'Name four red fruits, please.']
    """

    def __init__(self, held_out: Iterable[str], ngram: int) -> None:
        self._ngram = ngram
        self._wholes: dict[tuple[str, ...], str] = {}
        self._runs: dict[tuple[str, ...], str] = {}
        for prompt in sorted(held_out):
            words = words_of(prompt)
            if words:
                self._wholes.setdefault(tuple(words), prompt)
            if len(words) >= ngram:
                for run in ngrams(words, ngram):
                    self._runs.setdefault(run, prompt)

    def find(self, text: str) -> str | None:
        """The held-out prompt with the same words, else one that shares a run; the first in the alphabet of several."""
        words = words_of(text)
        if (same := self._wholes.get(tuple(words))) is not None:
            return same
        # A text with fewer words has no run of that many.
        runs = ngrams(words, self._ngram) if len(words) >= self._ngram else set()
        return min((self._runs[run] for run in runs if run in self._runs), default=None)


@dataclasses.dataclass
class PromptFilter:
    """Decides which prompts are kept, and counts by reason why the others are not.

    `near_duplicates` holds what is known at the start, such as the seed prompts, and every kept prompt; `contamination` the
    held-out prompts. `matches` are dropped prompts, each with the held-out prompt it overlaps with. Without a language (ISO
    639-1) all are kept. `fits` says whether a model can answer it. `parse` finds the prompt in what was written; by default
    where the generator puts it. With rules, a prompt whose rules do not parse, or which does not state them, is dropped: its words
    probably state one, which then nothing would check, and a reward model would choose between its answers by style.
    """

    min_words: int
    max_words: int
    language: str | None
    near_duplicates: NearDuplicates
    contamination: Contamination
    parse: Callable[[str], str | None] = parse_question
    with_rules: bool = False
    fits: Callable[[str], bool] = lambda prompt: True
    dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    matches: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def keep(self, written: str) -> str | None:
        """The prompt in what was written, or None; then the reason is counted."""
        prompt = self.parse(written)
        reason = "unparsable" if prompt is None else self._reason_of_rules(prompt, written) or self._reason(prompt)
        if prompt is None or reason is not None:
            self.dropped[str(reason)] += 1
            return None
        self.near_duplicates.add(prompt)
        return prompt

    def _reason_of_rules(self, prompt: str, written: str) -> str | None:
        if not self.with_rules:
            return None
        rules = parse_rules(written)
        if rules is None:
            return "bad_rules"
        stated = self.language != "en" or all(is_stated(prompt, rule) for rule in rules)
        return None if stated else "rules_not_stated"

    def _reason(self, prompt: str) -> str | None:
        length = len(words_of(prompt))
        if length < self.min_words:
            return "too_short"
        if length > self.max_words:
            return "too_long"
        if self.language is not None and not is_language(prompt, self.language):
            return "other_language"
        if overlap := self.contamination.find(prompt):
            self.matches.append((prompt, overlap))
            return "contaminated"
        if self.near_duplicates.find(prompt):
            return "near_duplicate"
        return None if self.fits(prompt) else "over_context"


def draw_until_enough(
    sources: Sequence[Row],
    wanted: int,
    write: Callable[[Sequence[Row]], Sequence[Row]],
    keep: Callable[[str], str | None],
) -> tuple[list[Row], int]:
    """Writes prompts from keyword sets (or seed prompts shown) until enough are valid or all of these are used up.

    Each round draws as many as the share of valid prompts so far makes necessary, and from the second on somewhat more: a third
    would start the engine once more. What is kept does not depend on the rounds. `write` turns what was drawn into one
    completion each, with the column `text`; `keep` finds the valid prompt in a text, or None. Returns the kept rows (source
    and completion together, plus the column `prompt`), and how many sources were used.
    """
    kept: list[Row] = []
    used = 0
    while len(kept) < wanted and used < len(sources):
        needed = math.ceil(ROUND_MARGIN * (wanted - len(kept)) / max(len(kept) / used, 0.1)) if used else wanted
        size = max(SMALLEST_ROUND, needed)
        drawn = sources[used : used + size]
        used += len(drawn)
        for source, completion in zip(drawn, write(drawn), strict=True):
            prompt = keep(completion["text"])
            if prompt is not None:
                kept.append({**source, **completion, "prompt": prompt})
    return kept[:wanted], used


def is_language(text: str, language: str) -> bool:
    """Whether a text is taken to be in a language (ISO 639-1)."""
    import py3langid

    return py3langid.classify(text)[0] == language
