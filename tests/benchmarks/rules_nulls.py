"""How many verifiable instructions M_t follows, beside what says the same of answers that are known to be no better.

    python -m tests.benchmarks.rules_nulls HOME ITERATION FILE.csv

The nulls are those of `instruction_following`, on the same split. Beside each stands how many words its answers have.
"""

import sys
from pathlib import Path

import polars as pl

from synpo_assets.method.rules import followed
from synpo_assets.method.verifiable import null_answers


def rows(asked: pl.DataFrame, split: str) -> list[dict[str, object]]:
    asked = asked.filter(split=split)
    answers = {
        "M_t": asked["candidate_response"].to_list(),
        "M_0": asked["initial_response"].to_list(),
        **null_answers(asked),
    }
    return [
        {
            "split": split,
            "answers": name,
            "n": len(texts),
            "followed": sum(all(followed(*row)) for row in zip(asked["constraints"], texts, strict=True)),
            "median_words": pl.Series([len(text.split()) for text in texts]).median(),
        }
        for name, texts in answers.items()
    ]


if __name__ == "__main__":
    table = pl.read_parquet(Path(sys.argv[1]) / "tables" / "instruction_following" / f"{int(sys.argv[2]):04d}.parquet")
    found = pl.DataFrame([row for split in ("dev", "test") for row in rows(table, split)])
    found.write_csv(sys.argv[3])
