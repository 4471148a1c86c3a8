"""How long threads should spin before they sleep while they wait for each other: alone, and beside a program that needs a core.

    python -m tests.benchmarks.waiting MODEL

MODEL is a model directory. Each way of waiting gets a process of its own, in which the same work is timed: a token step of a few
rows, scoring and a training step, in milliseconds.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

WAYS = {
    "sleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
    "1,000 turns": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"},
    "4,000 turns": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "4000"},
    "20,000 turns": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000"},
    "libgomp's default": {},
}
ROWS = (1, 3, 16)
ROUNDS = 3


def measured(directory: str) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    from resources.generation.few_rows import multiply_few_rows_faster
    from resources.generation.growing_cache import growing_cache
    from tests.benchmarks.token_steps import step_milliseconds

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    scored, trained = torch.randint(0, 1000, (8, 120)), torch.randint(0, 1000, (4, 200))

    def score() -> None:
        with torch.inference_mode():
            model(scored)

    def train() -> None:
        model(trained, labels=trained).loss.backward()
        model.zero_grad()

    found = {"score": _milliseconds(score), "train": _milliseconds(train)}
    multiply_few_rows_faster(model.eval())
    steps = {
        f"{rows} rows": statistics.median(
            step_milliseconds(model, growing_cache(model.config), rows) for _ in range(ROUNDS)
        )
        for rows in ROWS
    }
    return {name: round(each, 1) for name, each in (steps | found).items()}


def _milliseconds(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return 1000 * statistics.median(times)


@contextlib.contextmanager
def beside(busy: bool) -> Iterator[None]:
    """With a program that never gives its core away, where asked for."""
    if not busy:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as program:
        try:
            yield
        finally:
            program.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        sys.stdout.write(json.dumps(measured(arguments.model)) + "\n")
        return
    command = [sys.executable, "-m", "tests.benchmarks.waiting", arguments.model, "--measure"]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    for busy in (False, True):
        for way, variables in WAYS.items():
            with beside(busy):
                result = subprocess.run(
                    command, env=environment | variables, check=True, capture_output=True, text=True
                )
            sys.stdout.write(
                json.dumps({"busy": busy, "way": way, **json.loads(result.stdout.splitlines()[-1])}) + "\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
