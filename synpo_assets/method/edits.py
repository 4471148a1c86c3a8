"""The improver as an editor: the damaged answers that it is shown, and what it made of each of them.

A response improver that only learns to write gold anew may never look at the answer that it is shown. Gold with one known
damage (damage.py) tells: what is wrong is small, and all else is right as it is. What becomes of a damaged answer is measured in
words and marks, so that white space does not count. Its distance to gold is the number of them that difflib finds on one side
only; difflib may miss the least one, but of 18,659 rewrites made from the held-out seed by two damages the least distance gives
99.8 % the same outcome:

- `right`: the rewrite is gold.
- `nearer`: it is not gold, but nearer to it than the damaged answer was.
- `left`: it is the damaged answer.
- `worse`: anything else. What was changed without getting nearer to gold counts here too, so that no doubt speaks for the
  improver. So does what cannot be known, such as another good item in the place of a lost one; that is why the kinds of
  damage are reported one by one, and beside a model that was not trained to edit.
"""

import difflib
import random
from typing import Any

import polars as pl
import regex

from synpo_assets.method.damage import DAMAGES, all_damages
from synpo_assets.method.judging import other_answers
from synpo_assets.method.outcomes import outcomes, win_rate, win_rate_interval
from synpo_assets.method.words import WORD

# Words, of scripts without spaces their characters, and marks.
TOKEN = regex.compile(rf"{WORD.pattern}|[^\w\s]|\w", regex.VERSION1)
EDIT_OUTCOMES = ("right", "nearer", "left", "worse")
ENDS = ("", "_low", "_high")


def damaged_copies(rows: pl.DataFrame, copies: int, seed: int) -> pl.DataFrame:
    """Up to `copies` rows for each row, each with a different damage (columns damage, damaged); fewer where fewer apply.

    Args:
        rows: prompt and answer, and columns that stay.
        seed: Draws the damages, and where they are done.
    """
    found, others = [], other_answers(rows["answer"].to_list())
    for row, other in zip(rows.iter_rows(named=True), others, strict=True):
        damages = all_damages(row["answer"], other, seed)
        drawn = random.Random(f"{seed}:{row['prompt']}").sample(list(damages), min(copies, len(damages)))
        found += [row | {"damage": name, "damaged": damages[name]} for name in drawn]
    return pl.DataFrame(found, schema=dict(rows.schema) | {"damage": pl.String, "damaged": pl.String})


def edit_outcome(gold: str, damaged: str, rewrite: str) -> str:
    r"""What a rewrite made of a damaged answer.

    Examples:
        >>> gold, damaged = "Boil 2 eggs. Wait.", "Boil 7 eggs. Wait."
        >>> [edit_outcome(gold, damaged, rewrite) for rewrite in ("Boil 2 eggs.\nWait.", damaged, "Boil 5 eggs. Wait.")]
        ['right', 'left', 'worse']
        >>> edit_outcome("Boil it.", "Boil it. It rains today. Boil it.", "Boil it. Boil it.")
        'nearer'
    """
    meant, shown, written = (TOKEN.findall(text) for text in (gold, damaged, rewrite))
    if written == meant:
        return "right"
    if written == shown:
        return "left"
    return "nearer" if _distance(meant, written) < _distance(meant, shown) else "worse"


def edit_shares(edits: pl.DataFrame) -> pl.DataFrame:
    """How often each outcome is what R_t and what M_0 made of damaged answers: of all together, then by damage.

    Intervals are over prompts. That of the difference is Tango's for paired outcomes, as in win rates, which has a width where
    neither of them ever got there.

    Args:
        edits: prompt_id, damage and the outcomes (`improver_outcome`, `initial_outcome`).
    """
    by_damage = [(name, edits.filter(damage=name)) for name in DAMAGES]
    rows: list[dict[str, Any]] = [
        {"damage": damage, "outcome": outcome, "answers": part.height, "prompts": part["prompt_id"].n_unique()}
        | _compared(part["improver_outcome"] == outcome, part["initial_outcome"] == outcome, part["prompt_id"])
        for damage, part in [(None, edits), *by_damage]
        if part.height
        for outcome in EDIT_OUTCOMES
    ]
    return pl.DataFrame(rows, schema_overrides={"damage": pl.String}, infer_schema_length=None)


def _compared(improver: pl.Series, initial: pl.Series, prompts: pl.Series) -> dict[str, Any]:
    """Both shares and R_t's less M_0's (`gain`), each with the ends of its interval."""
    ours, theirs = improver.cast(pl.Int64), initial.cast(pl.Int64)
    rates = {"improver": _rates(2 * ours - 1, prompts), "initial": _rates(2 * theirs - 1, prompts)}
    # R_t wins where it alone got there, so the rate is half of one plus the difference.
    rates["gain"] = [2 * rate - 1 for rate in _rates(ours - theirs, prompts)]
    return {f"{name}{end}": rate for name, found in rates.items() for end, rate in zip(ENDS, found, strict=True)}


def _rates(margins: pl.Series, prompts: pl.Series) -> list[float]:
    """The win rate and the ends of its interval."""
    judged = outcomes(margins)
    return [rate for rate in (win_rate(judged), *(win_rate_interval(judged, prompts) or ())) if rate is not None]


def _distance(gold: list[str], other: list[str]) -> int:
    """The words and marks that stand on one side only."""
    blocks = difflib.SequenceMatcher(None, gold, other, autojunk=False).get_matching_blocks()
    return len(gold) + len(other) - 2 * sum(block.size for block in blocks)
