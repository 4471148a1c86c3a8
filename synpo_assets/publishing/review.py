"""Pairs for people to read, who do not know which answer is chosen: a CSV file with a column for their verdict."""

import re

import polars as pl

from resources.common.text import visible
from synpo_assets.method.reviews import ABOUT, stands_first

# A spreadsheet would take a text that begins so for a formula.
FORMULA = re.compile(r"^(?=\s*([=+@]|-\S))")


def review_table(pairs: pl.DataFrame, random_seed: int) -> pl.DataFrame:
    """Pairs with both answers in an order drawn by the random seed, and empty columns for a verdict, its author and time."""
    rows = []
    for row in pairs.sort("iteration", "pair_id").iter_rows(named=True):
        ids = [row[f"{side}_response_id"] for side in ("chosen", "rejected")]
        answers = [row[side][-1]["content"] for side in ("chosen", "rejected")]
        first, second = answers if stands_first(random_seed, row["pair_id"], *ids) else answers[::-1]
        texts = {"prompt": row["prompt"][-1]["content"], "answer_1": first, "answer_2": second}
        rows.append(
            {"pair_id": row["pair_id"], "iteration": row["iteration"]}
            | {name: cell(text) for name, text in texts.items()}
            | dict.fromkeys(("verdict", *ABOUT))
        )
    return pl.DataFrame(rows, schema_overrides=dict.fromkeys(("verdict", *ABOUT), pl.String))


def cell(text: str) -> str:
    """A text as a cell of a spreadsheet, which takes it for no formula; only people read it."""
    return FORMULA.sub("'", visible(text))
