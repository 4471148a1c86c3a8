"""Keywords: from seed prompts with noise (to train the generator), from corpus paragraphs (to drive it).

Paper, section 2.1 and appendix: two keywords of a seed prompt and one noise keyword from another seed prompt;
at generation three keywords of one paragraph, lists with personal names or stopwords dropped. How keywords are
extracted, and their order, is not stated: we use YAKE (single words, statistical, no model) and a random order.
Where the paper drops a whole list, we drop the offending word, so that short corpora give enough sets.
"""

import functools
import importlib
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import regex

from synpo_assets.method.ids import content_id
from synpo_assets.method.words import SEGMENTED, UNSPACED_CHARACTER, segments

if TYPE_CHECKING:
    from yake import KeywordExtractor

NAME_LOCALES = ("en_US", "en_GB", "de_DE", "es_ES", "fr_FR", "it_IT", "pt_BR", "pl_PL", "en_IN")
# Of letters, their marks, and joiners between them.
WORD = regex.compile(r"\p{L}[\p{L}\p{M}\u200c\u200d]*")
BLANK_LINES = regex.compile(r"\r?\n\s*\n")
SHORTEST, SHORTEST_SEGMENT = 3, 2
# Stopwords and names are left out of what was found.
FEWEST_FOUND = 50
# A letter that no text holds. YAKE leaves out words of two letters, which most Chinese words are.
FILLER = "\ua78f"


class Keywords:
    """Extracts single-word keywords of a text, best first; in a language without spaces, what a parser takes for words."""

    def __init__(self, language: str = "en", drop_personal_names: bool = True) -> None:
        """Takes the stopwords of a language by its ISO 639-1 code; names of people can be left out."""
        self._language = language
        self._names = _personal_names() if drop_personal_names else frozenset()

    def of(self, text: str, count: int) -> list[str]:
        """The best keywords, in lower case.

        Stopwords, words of less than three letters (two, without spaces) and personal names are left out, and so is text without
        spaces of another language than this one, of which nothing tells the words apart. A word counts as a
        name if it is on a list of names and never written in lower case in the text: `Maria Lopez` is dropped, `rose` is kept.
        """
        words, shortest = set(WORD.findall(text)), SHORTEST
        extractor = _extractor(self._language, max(FEWEST_FOUND, 2 * count))
        if self._language in SEGMENTED:
            parts = segments(text, self._language).split()
            words, shortest = set(parts), SHORTEST_SEGMENT
            text = " ".join(part if part in extractor.stopword_set else f"{part}{FILLER}" for part in parts)
        found = (surface.lower().removesuffix(FILLER) for surface, _score in extractor.extract_keywords(text))
        kept = [
            word
            for word in dict.fromkeys(found)
            if len(word) >= shortest and WORD.fullmatch(word) and (word in words or word not in self._names)
            if self._language in SEGMENTED or not UNSPACED_CHARACTER.search(word)
        ]
        return kept[:count]

    def of_each(self, texts: Sequence[str], count: int) -> list[tuple[str, list[str]]]:
        """Each text with its keywords."""
        return [(text, self.of(text, count)) for text in texts]


def training_keywords(
    prompts: Sequence[str], keywords: Keywords, from_prompt: int, noise: int, random_seed: int
) -> list[list[str] | None]:
    """Keywords for each seed prompt: some of its own and some noise from another prompt, drawn at random, in random order.

    None where the prompt (or every other one tried) has too few keywords.
    """
    extracted = [keywords.of(prompt, from_prompt + noise + 2) for prompt in prompts]
    sources = [place for place, words in enumerate(extracted) if len(words) >= noise]
    result: list[list[str] | None] = []
    for index, own in enumerate(extracted):
        if len(own) < from_prompt:
            result.append(None)
            continue
        draw = random.Random(f"{random_seed}:noise:{index}")
        others = (extracted[place] for place in _in_random_order(sources, draw) if place != index)
        foreign = next((rest for words in others if len(rest := [w for w in words if w not in own]) >= noise), None)
        if foreign is None:
            result.append(None)
            continue
        chosen = draw.sample(own, from_prompt) + draw.sample(foreign, noise)
        draw.shuffle(chosen)
        result.append(chosen)
    return result


def _in_random_order(values: Sequence[int], draw: random.Random) -> Iterator[int]:
    """As a shuffled copy has them, drawn one by one: mostly the first is needed, and a copy for each seed row would take long."""
    moved = dict[int, int]()
    for left in range(len(values), 0, -1):
        place = draw.randrange(left)
        yield values[moved.get(place, place)]
        moved[place] = moved.get(left - 1, left - 1)


def paragraphs_of(document: str) -> list[str]:
    """The parts between blank lines; if there are none, the lines, as documents of web corpora have them."""
    parts = BLANK_LINES.split(document.strip())
    return parts if len(parts) > 1 else parts[0].splitlines()


def paragraph_keyword_sets(
    paragraphs: Iterable[tuple[str, list[str]]], size: int, random_seed: int
) -> Iterator[tuple[str, list[str]]]:
    """Keyword sets from a stream of paragraphs with their keywords; memory holds one hash per set, not the sets.

    The sets of one paragraph share no keyword, and no two sets hold the same words.
    """
    seen: set[int] = set()
    for number, (paragraph, words) in enumerate(paragraphs):
        random.Random(f"{random_seed}:set:{number}").shuffle(words)
        for start in range(0, len(words) - size + 1, size):
            chosen = words[start : start + size]
            identity = hash(frozenset(chosen))
            if identity not in seen:
                seen.add(identity)
                yield paragraph, chosen


def keyword_set(paragraph: str, keywords: Sequence[str]) -> dict[str, object]:
    """The row of one keyword set; the id depends on the words and not on their order."""
    return {
        "keyword_set_id": content_id("keywords", *sorted(keywords)),
        "keywords": list(keywords),
        "paragraph": paragraph,
    }


def drawn_rows(pool_size: int, iteration: int, count: int, random_seed: int) -> list[int]:
    """Rows of the keyword pool that an iteration draws: without repetition, also across iterations that draw as many.

    The pool is shuffled once; iteration t takes the t-th slice of its size and starts over when the pool is used up.
    """
    order = random.Random(f"{random_seed}:pool").sample(range(pool_size), pool_size)
    start = (iteration - 1) * count
    return [order[(start + step) % pool_size] for step in range(min(count, pool_size))]


@functools.cache
def _extractor(language: str, most: int) -> "KeywordExtractor":
    from yake import KeywordExtractor

    return KeywordExtractor(lan=language, n=1, top=most)


@functools.cache
def _personal_names() -> frozenset[str]:
    names: set[str] = set()
    for locale in NAME_LOCALES:
        provider = importlib.import_module(f"faker.providers.person.{locale}").Provider
        names.update(provider.first_names, provider.last_names)
    return frozenset(name.lower() for name in names)
