"""What people say of pairs: which answer stands first for them, what their words mean, and what becomes of a pair.

Paper: no human takes part after the seed.
Here: a person may read pairs without knowing which answer is the chosen one. The order of the two answers is drawn by random
seed, pair and answer, so that it can be found again from the pair alone, whichever side an answer is on by now.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import polars as pl

from synpo_assets.method.ids import content_id

Outcome = Literal["confirmed", "flipped", "dropped"]
OUTCOMES: tuple[Outcome, ...] = ("confirmed", "flipped", "dropped")
# By these, no answer is better than the other.
UNDECIDED = ("tie", "neither", "both")
WORDS = ("1", "2", *UNDECIDED)
NEEDED = ("pair_id", "verdict")
ABOUT = ("reviewer", "reviewed_at")
# What a file may call them: as they are exported here, in Label Studio's CSV, and in Argilla's flat records.
NAMES = {
    "pair_id": ("pair_id", "id"),
    "verdict": ("verdict", "verdict.responses"),
    "reviewer": ("reviewer", "annotator", "verdict.responses.users"),
    "reviewed_at": ("reviewed_at", "updated_at"),
}
SIDES = ("chosen", "rejected")
# Of the two sides of a pair, what changes places where people prefer the rejected one.
PLACES = ("response", "finish_reason", "checkpoint_sha", "response_id", "score")
VERDICT_COLUMNS = {
    "pair_id": pl.String, "verdict": pl.String, "reviewer": pl.String, "reviewed_at": pl.String, "line": pl.Int64,
}  # fmt: skip


def stands_first(random_seed: int, pair_id: str, response_id: str, other_id: str) -> bool:
    """Whether an answer stands before the other one of its pair.

    Examples:
        >>> stands_first(1, "pair-1", "response-a", "response-b") != stands_first(1, "pair-1", "response-b", "response-a")
        True
    """
    mine, theirs = (content_id("order", random_seed, pair_id, each) for each in (response_id, other_id))
    return mine < theirs


def read_verdicts(rows: Iterable[tuple[int, Mapping[str, Any]]]) -> tuple[pl.DataFrame, str | None]:
    """The verdicts in the rows of a file, and what is wrong with them as a sentence; None if nothing is.

    Rows without a verdict are left out: nobody has read them yet.
    """
    found, lines, columns = list[dict[str, Any]](), dict[str, int](), set[str]()
    for line, row in rows:
        columns |= set(row)
        cells = {
            name: next((row[each] for each in names if row.get(each) not in (None, "", [])), None)
            for name, names in NAMES.items()
        }
        if isinstance(cells["verdict"], list) and len(cells["verdict"]) > 1:
            return _frame([]), f"line {line} holds {len(cells['verdict'])} verdicts: leave one"
        texts = {name: _text(cell) for name, cell in cells.items()}
        word, pair_id = texts["verdict"].lower(), texts["pair_id"]
        if not word:
            continue
        if word not in WORDS:
            return _frame([]), f"line {line}: the verdict {word[:40]!r} is none of {', '.join(WORDS)}"
        if not pair_id:
            return _frame([]), f"line {line} has a verdict and no pair_id"
        if pair_id in lines:
            return _frame([]), f"lines {lines[pair_id]} and {line} hold two verdicts for {pair_id[:40]}: leave one"
        lines[pair_id] = line
        found.append(texts | {"verdict": word, "line": line})
    if missing := [name for name in NEEDED if columns.isdisjoint(NAMES[name])]:
        has = ", ".join(f"`{name}`" for name in sorted(columns)) or "none"
        return _frame([]), f"there is no column {', '.join(f'`{name}`' for name in missing)}; there is {has}"
    return _frame(found), None


def decided(candidates: pl.DataFrame, verdicts: pl.DataFrame, random_seed: int) -> pl.DataFrame:
    """The candidates that people have read, with verdict, reviewer, reviewed_at and the outcome, in their order."""
    read = candidates.join(verdicts.drop("line"), on="pair_id", how="inner", maintain_order="left")
    ids = read.select("verdict", "pair_id", "chosen_response_id", "rejected_response_id").iter_rows()
    outcomes = [_outcome(word, stands_first(random_seed, *each)) for word, *each in ids]
    return read.with_columns(outcome=pl.Series(outcomes, dtype=pl.String))


def apply_outcomes(pairs: pl.DataFrame, outcomes: pl.DataFrame) -> tuple[pl.DataFrame, int]:
    """Pairs as people want them: without those that they drop, whose number is returned too, and with flipped ones turned."""
    joined = pairs.join(outcomes.select("pair_id", "outcome"), on="pair_id", how="left", maintain_order="left")
    kept = joined.filter(pl.col("outcome").is_null() | (pl.col("outcome") != "dropped"))
    is_flipped = (pl.col("outcome") == "flipped").fill_null(False)
    turned = [
        pl.when(is_flipped).then(pl.col(f"{other}_{what}")).otherwise(pl.col(f"{side}_{what}")).alias(f"{side}_{what}")
        for what in PLACES
        for side, other in (SIDES, SIDES[::-1])
    ]
    margin = pl.when(is_flipped).then(-pl.col("margin")).otherwise(pl.col("margin"))
    return kept.with_columns(*turned, margin=margin).drop("outcome"), joined.height - kept.height


def _outcome(word: str, chosen_is_first: bool) -> Outcome:
    if word in UNDECIDED:
        return "dropped"
    return "confirmed" if (word == "1") == chosen_is_first else "flipped"


def _text(value: Any) -> str:
    """A cell as text: a spreadsheet may have made a number of it, and a labelling tool a list of one."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "" if value is None else str(value).strip()
    return text.removesuffix(".0") if text in ("1.0", "2.0") else text


def _frame(rows: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=VERDICT_COLUMNS)
