"""Memory of the generation stage from a thousand to a hundred thousand prompts, with an engine that makes up its tokens.

    python -m tests.benchmarks.memory

Each size runs in a fresh process that has loaded what a step's process has loaded, from the table of prompts to the finished
table of answers: rendering, keys, shards, rows in order, usage. No model is loaded, so what is measured is the stage itself.
"""

import argparse
import importlib
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

import resources.generation.language_model
from resources.generation.engine import Completion, Requests
from resources.settings.machine import Engine
from resources.settings.method import Sampling
from resources.storage.checkpoint_store import Checkpoint
from synpo_assets.method.templates import user_message
from tests.nano import make_nano_model, seed_rows

# As the forkserver of definitions.py does.
PRELOADED = ("definitions", "transformers", "trl", "peft")
SIZES = (1_000, 10_000, 100_000)
BATCH = 64
TOKENS = 64
# At 1.4 tokens to a word.
WORDS = 46


class MadeUpTokens:
    """An engine whose completions are words at random."""

    def __init__(self, *_: Any) -> None:
        self._words = " ".join(row["answer"] for row in seed_rows()).split()

    def generate(self, requests: Requests, sampling: Sampling) -> Iterator[list[Completion]]:
        batch = []
        for request in requests:
            text = " ".join(random.Random(request.seed).choices(self._words, k=WORDS))
            batch.append(Completion(request.key, text, len(request.token_ids), sampling.max_new_tokens, "length"))
            if len(batch) == BATCH:
                yield batch
                batch = []
        yield batch


def write_prompts(rows: int, file: Path) -> None:
    words = " ".join(row["prompt"] for row in seed_rows()).split()
    texts = [" ".join(words[7 * number % len(words) :][: 8 + number % 24]) for number in range(rows)]
    pl.DataFrame({"prompt_id": [f"prompt-{number:016x}" for number in range(rows)], "prompt": texts}).write_parquet(
        file
    )


def measure(prompts: pl.DataFrame, model: str, shards: str) -> dict[str, float]:
    rows = prompts.height
    for module in PRELOADED:
        importlib.import_module(module)
    resources.generation.language_model.open_engine = MadeUpTokens
    language_model = resources.generation.language_model.LanguageModel(shards=shards, engine=Engine(), random_seed=1)
    asked = ((prompt_id, user_message(prompt)) for prompt_id, prompt in prompts.iter_rows())
    checkpoint = Checkpoint("initial_policy", None, "nano", model, model)
    sampling = Sampling(temperature=0.7, max_new_tokens=TOKENS)
    before = peak_mib()
    frame, usage = language_model.answer(checkpoint, asked, sampling)
    assert frame.height == usage.rows == rows
    return {"rows": rows, "seconds": round(usage.seconds, 1), "MiB before": before, "peak MiB": peak_mib()}


def peak_mib() -> float:
    """The largest resident set so far; `getrusage` would count that of the process that started this one too."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return round(int(line.split()[1]) / 1024, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prompts:
        with tempfile.TemporaryDirectory() as shards:
            print(json.dumps(measure(pl.read_parquet(arguments.prompts), arguments.model, shards)))  # noqa: T201
        return
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        model = make_nano_model(Path(folder) / "nano")
        for rows in SIZES:
            file = Path(folder) / f"{rows}.parquet"
            write_prompts(rows, file)
            command = [sys.executable, "-m", "tests.benchmarks.memory", f"--prompts={file}", f"--model={model}"]
            result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            measured.append(json.loads(result.stdout.splitlines()[-1]))
    growth = measured[-1]["peak MiB"] / measured[0]["peak MiB"]
    print(json.dumps({"sizes": measured, "peak at most over peak at least": round(growth, 3)}, indent=2))  # noqa: T201


if __name__ == "__main__":
    main()
