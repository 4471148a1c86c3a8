"""Cost per row and memory of building preference pairs from 10,000, 100,000 and 1,000,000 synthetic rows.

    python -m tests.benchmarks.pairs

Measured are the near-duplicate search and the decontamination of the prompts, then joining, filtering and sampling the
pairs, and their conversational format. The rows are made up and written as parquet files beforehand. Each step of each
size runs in fresh processes, as the two assets do, in turns; the cost per row is the sum of the medians over the rounds.
It is CPU time of the functions alone, because the machine may be busy; the memory is the peak of the whole process.
"""

import argparse
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import polars as pl

from synpo_assets.method.ids import content_id
from synpo_assets.method.pairs import as_preferences, join_sides, select_pairs
from synpo_assets.method.prompts import Contamination, NearDuplicates, PromptFilter
from synpo_assets.method.rules import CONSTRAINTS
from synpo_assets.method.templates import QUESTION_END, QUESTION_START

STEPS = ("prompts", "pairs")
WARM_UP_ROWS = 100
PART_ROWS = 50_000
VOCABULARY = 50_000
HELD_OUT = 1_000
NGRAM = 8


class Writer:
    """Writes texts of made-up words, of which the n-th is used in proportion to 1 / n."""

    def __init__(self, random_seed: int) -> None:
        self.random = random.Random(random_seed)
        syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
        self._words = [word_of(number, syllables) for number in range(VOCABULARY)]

    def words(self, least: int, most: int) -> list[str]:
        chosen = (VOCABULARY ** self.random.random() for _ in range(self.random.randint(least, most)))
        return [self._words[int(rank) - 1] for rank in chosen]


def word_of(number: int, syllables: list[str]) -> str:
    number, last = divmod(number, len(syllables))
    return (word_of(number - 1, syllables) if number else "") + syllables[last]


def prompts(writer: Writer, count: int, held_out: list[str]) -> Iterator[str]:
    """Prompts of 8 to 40 words: 10 % repeat an earlier one and add a word, 1 % hold a run of a held-out one."""
    earlier: list[str] = []
    for _ in range(count):
        kind, words = writer.random.random(), writer.words(8, 40)
        if kind < 0.1 and earlier:
            text = f"{writer.random.choice(earlier)} {words[0]}"
        elif kind < 0.11:
            text = " ".join([*words[:20], *writer.random.choice(held_out).split()[:NGRAM]])
        else:
            text = " ".join(words)
            earlier.append(text)
        yield text


def responses(writer: Writer, prompts: pl.DataFrame, side: str) -> pl.DataFrame:
    """Responses of 40 to 120 words: 5 % repeat a phrase, 1 % are empty."""
    texts = []
    for _ in range(prompts.height):
        kind, words = writer.random.random(), writer.words(40, 120)
        texts.append("" if kind < 0.01 else " ".join(words[:6] * 12 if kind < 0.06 else words))
    return prompts.with_columns(
        response_id=pl.Series([content_id("response", side, text) for text in texts]),
        response=pl.Series(texts),
        finish_reason=pl.lit("stop"),
        checkpoint_sha=pl.lit(content_id("checkpoint", side)),
    )


def write_tables(folder: Path, count: int) -> None:
    """The inputs as parquet files of a few rows each, so that they are never held whole."""
    folder.mkdir()
    writer = Writer(random_seed=1)
    held_out = [" ".join(writer.words(NGRAM, 40)) for _ in range(HELD_OUT)]
    pl.DataFrame({"prompt": held_out}).write_parquet(folder / "held_out.parquet")
    texts = prompts(writer, count, held_out)
    for start in range(0, count, PART_ROWS):
        numbers = range(start, min(start + PART_ROWS, count))
        part = pl.DataFrame({
            "prompt_id": [content_id("prompt", number) for number in numbers],
            "prompt": [next(texts) for _ in numbers],
        })  # fmt: skip
        for side in ("chosen", "rejected"):
            responses(writer, part, side).write_parquet(folder / f"{side}-{start:07}.parquet")


def filter_prompts(written: pl.Series, held_out: list[str]) -> dict[str, int]:
    """What the asset of the prompts does with what the generator wrote, without the detection of the language."""
    prompts = PromptFilter(3, 80, None, NearDuplicates(0.7), Contamination(held_out, NGRAM))
    kept = [prompts.keep(text) for text in written]
    return {"kept": sum(prompt is not None for prompt in kept), **prompts.dropped}


def build_pairs(chosen: pl.DataFrame, rejected: pl.DataFrame, scores: pl.Series) -> dict[str, int]:
    """What the asset of the pairs does with the two sides, without the scorer."""
    scored = join_sides(chosen, rejected).with_columns(
        chosen_score=scores, rejected_score=pl.lit(0.0), score_convention=pl.lit("reward_difference"),
        constraints=pl.lit([], CONSTRAINTS),
    )  # fmt: skip
    kept, dropped = select_pairs(scored, 0.1, 0.5, 3, chosen.height // 2, random_seed=1)
    return {"kept": as_preferences(kept).height, **dropped}


def measure(step: str, folder: Path) -> dict[str, Any]:
    """Runs a step over the tables in a folder, after a few rows that take what the first call costs."""
    if step == "prompts":
        held_out = pl.read_parquet(folder / "held_out.parquet")["prompt"].to_list()
        written = pl.read_parquet(folder / "chosen-*.parquet", columns=["prompt"])["prompt"]
        count = written.len()
        inputs = (QUESTION_START + written + QUESTION_END, held_out)
        filter_prompts(inputs[0].head(WARM_UP_ROWS), held_out)
        started, processor = time.monotonic(), time.process_time()
        rows = filter_prompts(*inputs)
    else:
        sides = [pl.read_parquet(folder / f"{side}-*.parquet") for side in ("chosen", "rejected")]
        count = sides[0].height
        scores = pl.Series("score", range(count)).shuffle(seed=1) / count
        build_pairs(*(side.head(WARM_UP_ROWS) for side in sides), scores.head(WARM_UP_ROWS))
        started, processor = time.monotonic(), time.process_time()
        rows = build_pairs(*sides, scores)
    return {
        "rows": rows,
        "seconds": round(time.monotonic() - started, 2),
        "CPU microseconds per row": round((time.process_time() - processor) / count * 1e6, 2),
        "peak RSS in MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def in_fresh_process(*arguments: object) -> str:
    command = [sys.executable, "-m", "tests.benchmarks.pairs", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def compare(sizes: list[int], rounds: int) -> dict[str, Any]:
    measured: dict[int, dict[str, list[Any]]] = {size: {step: [] for step in STEPS} for size in sizes}
    with tempfile.TemporaryDirectory() as tables:
        for size in sizes:
            in_fresh_process("--write", f"{tables}/{size}", size)
        for _, size, step in itertools.product(range(rounds), sizes, STEPS):
            load = {"load of the machine before": round(os.getloadavg()[0], 1)}
            measured[size][step].append(json.loads(in_fresh_process("--measure", step, f"{tables}/{size}")) | load)
    costs = {
        size: sum(median(one["CPU microseconds per row"] for one in steps[step]) for step in STEPS)
        for size, steps in measured.items()
    }
    peaks = {
        size: max(one["peak RSS in MiB"] for step in STEPS for one in steps[step]) for size, steps in measured.items()
    }
    return {
        "measured": measured,
        "CPU microseconds per row": {size: round(cost, 1) for size, cost in costs.items()},
        f"cost per row over that of {sizes[0]} rows": {size: round(costs[size] / costs[sizes[0]], 3) for size in sizes},
        "peak RSS in MiB": peaks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        write_tables(Path(arguments.write[0]), int(arguments.write[1]))
    elif arguments.measure:
        print(json.dumps(measure(arguments.measure[0], Path(arguments.measure[1]))))  # noqa: T201
    else:
        print(json.dumps(compare(arguments.sizes, arguments.rounds), indent=2))  # noqa: T201


if __name__ == "__main__":
    main()
