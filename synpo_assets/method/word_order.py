"""Whether prompts are language at all: are they likelier than their own words in another order?

Nonsense is varied too, so a measure of variety needs one of sense beside it. Here it is a test that needs no judge. A
prompt is compared with its own words, shuffled, by their mean log-probability per token under M_0. It is in order if it is
ahead by more than 95 % of the shuffles are ahead of another shuffle of the same words. Words without an order therefore
pass in about 5 % of all cases, whatever M_0 is; how many do is measured and reported beside the share of the prompts. The
test says nothing of what a prompt means: a fluent question that nobody could answer passes. So the share is an upper
bound of what can be answered, and a judge's word is better where there is one.
"""

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from synpo_assets.method.outcomes import share_interval
from synpo_assets.method.words import PART, UNSPACED_CHARACTER

# What the prompts are read as an answer to, so that their likelihood is that of a prompt.
REQUEST = "Write one question or instruction for an assistant."
ORDERS = 3  # As it is, and its words in two other orders.
NULL_SHARE = 0.05


def in_three_orders(prompt: str, random_seed: int) -> list[str]:
    """A prompt, and twice its words in random order, with their punctuation; where no spaces are written, its characters.

    Examples:
        >>> in_three_orders("Why is ice slippery?", random_seed=0)
        ['Why is ice slippery?', 'slippery? is ice Why', 'Why slippery? is ice']
        >>> in_three_orders("水为什么结冰", random_seed=0)[1]
        '为水结冰什么'
    """
    draw, found = random.Random(f"{random_seed}:order:{prompt}"), list(PART.finditer(prompt))
    words = [match[0] for match in found]
    gaps = [before.end() < after.start() for before, after in itertools.pairwise(found)]
    others = list[str]()
    while len(others) < ORDERS - 1:
        order = draw.sample(words, len(words))
        # An order that is the prompt's own says nothing; of equal words there is no other.
        if order != words or len(set(words)) <= 1:
            others.append(_joined(order, gaps))
    return [prompt, *others]


def _joined(words: Sequence[str], gaps: Sequence[bool]) -> str:
    """Words with spaces where they stood, and between words that would else be one."""
    text = words[0] if words else ""
    for (before, after), is_gap in zip(itertools.pairwise(words), gaps, strict=True):
        is_one = not (UNSPACED_CHARACTER.match(before) or UNSPACED_CHARACTER.match(after))
        text += f" {after}" if is_gap or is_one else after
    return text


def ordered_shares(likelihoods: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """The share of the prompts of each source that are in order, its 95 % interval, and the same of their shuffled words.

    The likelihoods of a source are of shape (prompts, 3), as `in_three_orders` lays them out. The threshold is one for all
    sources: the difference that 5 % of the differences between two shuffles exceed.

    Examples:
        >>> prompts = np.array([[-2.0, -6.0, -6.5], [-2.5, -5.0, -4.5], [-5.0, -5.0, -4.9]])
        >>> ordered_shares({"seed": prompts})[0]["ordered_share"]
        0.6666666666666666
    """
    every = np.concatenate(list(likelihoods.values()))
    # Which of two shuffles is the first is chance, so each difference counts with both signs.
    between = every[:, 2] - every[:, 1]
    threshold = np.quantile(np.concatenate([between, -between]), 1 - NULL_SHARE)
    rows = []
    for source, own in likelihoods.items():
        passed = own[:, 0] - own[:, 1] > threshold
        shuffled = own[:, 2] - own[:, 1] > threshold
        rows.append(
            {"source": source, **_share("ordered", passed.tolist()), "shuffled_ordered_share": float(shuffled.mean())}
        )
    return rows


def answerable_shares(labelled: Mapping[str, Sequence[Mapping[str, Any] | None]]) -> list[dict[str, Any]]:
    """The share of the prompts of each source that a judge calls answerable, with its 95 % interval.

    Each prompt has `answerable`, true or false, or is None where the judge gave no label; such prompts are left out.
    """
    return [
        {"source": source, **_share("answerable", [label["answerable"] for label in labels if label is not None])}
        for source, labels in labelled.items()
    ]


def _share(name: str, holds: Sequence[bool]) -> dict[str, float | None]:
    low, high = share_interval(holds) or (None, None)
    share = sum(holds) / len(holds) if holds else None
    return {f"{name}_share": share, f"{name}_low": low, f"{name}_high": high}
