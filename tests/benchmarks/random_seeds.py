"""How many verifiable instructions M_t follows in runs that differ in their random seed alone, beside controls and nulls.

    python -m tests.benchmarks.random_seeds SPLIT FILE.csv HOME HOME ...

For each iteration that all homes have: a line for each home, and one for their mean. Differences are in points, with 95 % intervals
over templates of instructions. Those of the mean take the average over homes of each instruction first: they
say how far other templates would move it. How far other random seeds would is to be seen in the lines of the homes.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import polars as pl

import resources
from synpo_assets.method.evaluation import mean_gain
from synpo_assets.method.verifiable import nulls_followed, shares_followed

MEAN = "mean"
OF_PROMPT = ("prompt_id", "template")
# Homes of earlier versions do not say what their instructions were made of.
INSTRUCTIONS = Path(resources.__file__).parent / "seed" / "rules" / "instructions.jsonl"
DIFFERENCES = [("M_t", "M_0"), ("M_t", "M_{t-1}"), ("M_t", "control")]


def followed_shares(home: Path, iteration: int, split: str) -> pl.DataFrame | None:
    """Of each instruction the share of answers that follow it: a column for each model and null; None if not all is made."""

    def table(asset: str, number: int) -> pl.DataFrame | None:
        file = home / "tables" / asset / f"{number:04d}.parquet"
        if not file.exists():
            return None
        frame = pl.read_parquet(file).filter(split=split)
        return (
            frame if "template" in frame.columns else frame.with_columns(template=pl.col("prompt").replace(templates))
        )

    rows = map(json.loads, INSTRUCTIONS.read_text(encoding="utf-8").splitlines())
    templates = {row["prompt"]: row["template"] for row in rows}
    asked = table("instruction_following", iteration)
    if asked is None:
        return None
    shares = shares_followed(asked).rename({"candidate": "M_t", "initial": "M_0"})
    if (before := table("instruction_following", iteration - 1)) is not None:
        shares = shares.join(shares_followed(before, ["candidate"]).rename({"candidate": "M_{t-1}"}), on=OF_PROMPT)
    if (controlled := table("equal_steps_instructions", iteration)) is not None:
        shares = shares.join(shares_followed(controlled, ["control"]), on=OF_PROMPT)
    for null, met in nulls_followed(asked).items():
        of_null = asked.select("prompt_id", pl.Series(null, met)).group_by("prompt_id").agg(pl.col(null).mean())
        shares = shares.join(of_null, on="prompt_id")
    words = {side: pl.col(f"{answered}_response").str.count_matches(r"\S+") for side, answered in
             (("words_of_M_t", "candidate"), ("words_of_M_0", "initial"))}  # fmt: skip
    written = asked.group_by("prompt_id").agg(**{side: count.mean() for side, count in words.items()})
    return shares.join(written, on="prompt_id").sort("prompt_id")


def lines(found: dict[str, pl.DataFrame]) -> Iterator[dict[str, object]]:
    """A line for each home and one for the mean of all of them."""
    # Of a control that one home lacks there is no mean.
    common = [name for name in next(iter(found.values())).columns if all(name in each for each in found.values())]
    every = pl.concat(shares.select(common) for shares in found.values())
    together = every.group_by(OF_PROMPT).agg(pl.exclude(OF_PROMPT).mean()).sort("prompt_id")
    for name, shares in [*found.items(), (MEAN, together)]:
        columns = [column for column in shares.columns if column not in OF_PROMPT]
        of_words = [column for column in columns if column.startswith("words_of_")]
        line: dict[str, object] = {"home": name, "n": shares.height, "templates": shares["template"].n_unique()}
        for column in columns:
            value = shares[column].mean()
            assert isinstance(value, float)
            line[column] = round(value, 1) if column in of_words else round(100 * value, 1)
        for first, second in DIFFERENCES:
            if second in columns:
                gain = mean_gain(shares[first] - shares[second], shares["template"], most=1.0)
                line |= zip(
                    (f"{first} less {second}", f"{second} low", f"{second} high"),
                    (None if each is None else round(100 * each, 1) for each in gain),
                    strict=True,
                )
        yield line


def run(split: str, file: Path, homes: list[Path]) -> None:
    """Writes the lines of all iterations that each home has."""
    rows: list[dict[str, object]] = []
    iteration = 1
    while True:
        found = {home.name: shares for home in homes if (shares := followed_shares(home, iteration, split)) is not None}
        if len(found) < len(homes):
            break
        rows += [{"split": split, "iteration": iteration} | line for line in lines(found)]
        iteration += 1
    pl.DataFrame(rows, infer_schema_length=None).write_csv(file)


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), [Path(home) for home in sys.argv[3:]])
