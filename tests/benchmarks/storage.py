"""What checksums cost on reading, and the memory of `synpo trace` and of a large seed.

    python -m tests.benchmarks.storage checksums
    python -m tests.benchmarks.storage trace
    python -m tests.benchmarks.storage seed

Each prints one line of JSON. Memory is the largest resident set of a fresh process.
"""

import argparse
import contextlib
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import polars as pl

from resources.storage import tables
from resources.storage.tables import ParquetTables
from synpo_assets.graph.lineage import ID_COLUMNS
from tests.nano import nano_settings, seed_rows, write_settings

ROWS, PAIRS, SEED_ROWS = 1_000_000, 100_000, 200_000
REPETITIONS = 31
TEXTS = ("prompt", "response", "paragraph")


def texts(count: int, words: int) -> pl.Series:
    """Texts that differ, of 20,000 that are drawn word by word."""
    vocabulary = " ".join(row["answer"] for row in seed_rows()).split()
    draw = random.Random(1)
    drawn = pl.Series([" ".join(draw.choices(vocabulary, k=words)) for _ in range(20_000)])
    return drawn.sample(count, with_replacement=True, seed=1) + pl.int_range(count, eager=True).cast(pl.String)


def answers(count: int, words: int) -> pl.DataFrame:
    numbers = pl.int_range(count, eager=True).cast(pl.String)
    return pl.DataFrame({
        "response_id": "response-" + numbers, "prompt_id": "prompt-" + numbers, "prompt": texts(count, 12),
        "response": texts(count, words), "iteration": 1, "checkpoint_sha": "0" * 64, "finish_reason": "stop",
    })  # fmt: skip


def checksums(folder: Path) -> dict[str, Any]:
    """CPU seconds to read a table with and without comparing its checksum, one after the other, and the median of their ratios.

    What varies in reading is as much as what is measured: `checksum_alone` is what opening it with its checksum takes more.
    """
    store, ratios, seconds = ParquetTables(str(folder)), list[float](), list[tuple[float, float]]()
    store.write("base_responses", "0001", answers(ROWS, 46))

    place = store._place("base_responses", "0001")

    def read(with_comparison: bool, whole: bool = True) -> float:
        checksum = tables._checksum_file if with_comparison else lambda path: path.with_name("none")
        with mock.patch.object(tables, "_checksum_file", checksum):
            started = time.process_time()
            if whole:
                store.read("base_responses", "0001")
            else:
                tables._opened(place, "base_responses").close()
            return time.process_time() - started

    read(True)
    for repetition in range(REPETITIONS):
        # Either is the first as often as the other.
        taken = {compare: read(compare) for compare in (repetition % 2 == 0, repetition % 2 == 1)}
        seconds.append((taken[True], taken[False]))
        ratios.append(taken[True] / taken[False])
    alone = statistics.median(read(True, whole=False) - read(False, whole=False) for _ in range(REPETITIONS))
    compared, plain = (statistics.median(column) for column in zip(*seconds, strict=True))
    size = (folder / "base_responses" / "0001.parquet").stat().st_size
    return {"rows": ROWS, "megabytes": round(size / 1e6), "compared": compared, "plain": plain,
            "ratio_of_medians": compared / plain, "median_ratio": statistics.median(ratios),
            "checksum_alone": alone, "alone_of_plain": alone / plain}  # fmt: skip


def trace(folder: Path) -> dict[str, Any]:
    """Seconds and memory of `synpo trace` of one of many pairs, all of one iteration."""
    from tests.test_trace import Home

    write_settings(folder / "settings.yaml", nano_settings(folder / "model"))
    home = Home(folder)
    written = home.iteration(1)
    for asset, frame in written.items():
        number, texts_of = pl.int_range(PAIRS), [name for name in TEXTS if frame.schema.get(name) == pl.String]
        own = {
            name: pl.format(f"{kind}-{{}}", number)
            for kind, identity in ID_COLUMNS.items()
            for name in frame.columns
            if name.endswith(identity)
        }
        columns: dict[str, Any] = own | {name: texts(PAIRS, 46) for name in texts_of}
        for name in {"chosen", "rejected"} & set(frame.columns):
            columns[name] = pl.Series([[{"role": "assistant", "content": text}] for text in texts(PAIRS, 46)])
        more = pl.concat([frame.head(1)] * PAIRS).with_columns(**columns)
        home.tables.write(asset, "0001", pl.concat([frame, more.select(frame.columns)], how="vertical_relaxed"))
    home.checkpoint("model_checkpoint", 1, "first", {"preference_pairs[0001]": "any"})
    whole = written["preference_pairs"]["pair_id"][0]
    return measured(
        "from synpo_assets.cli.commands import app; app()", "trace", whole, "--json", "--home", str(folder)
    ) | {"pairs": PAIRS}


def seed(folder: Path) -> dict[str, Any]:
    """Seconds and memory of a large seed."""
    rows = zip(texts(SEED_ROWS, 30), texts(SEED_ROWS, 130), strict=True)
    with (folder / "train.jsonl").open("w") as file:
        file.writelines(f"{json.dumps({'prompt': prompt, 'answer': answer})}\n" for prompt, answer in rows)
    settings = nano_settings(folder / "model")
    settings["seed_data"] |= {
        "train": {"path": str(folder / "train.jsonl")},
        "train_limit": None,
        "on_bad_rows": "drop",
    }
    write_settings(folder / "settings.yaml", settings)
    code = (
        "import sys; from pathlib import Path; from resources.settings.files import load_settings; "
        "from synpo_assets.stages.seed import seed_table; print(seed_table(load_settings(Path(sys.argv[1])))[0].height)"
    )
    return measured(code, str(folder / "settings.yaml")) | {
        "megabytes": (folder / "train.jsonl").stat().st_size // 10**6
    }


def measured(code: str, *arguments: str) -> dict[str, Any]:
    """Runs Python code in a fresh process."""
    # `getrusage` would count the memory of the process that started it, too.
    told = (
        "import atexit, pathlib, sys\n"
        "atexit.register(lambda: sys.stderr.write(pathlib.Path('/proc/self/status').read_text()))\n"
    )
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", told + code, *arguments], capture_output=True, text=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    said, _, status = result.stderr.rpartition("VmHWM:")
    return {
        "returned": result.returncode,
        "said": (result.stdout + said)[-200:],
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "megabytes_of_memory": round(int(status.split()[0]) / 1024),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("checksums", "trace", "seed"))
    with tempfile.TemporaryDirectory() as directory, contextlib.suppress(BrokenPipeError):
        sys.stdout.write(json.dumps(globals()[parser.parse_args().what](Path(directory))) + "\n")
