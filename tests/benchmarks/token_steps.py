"""How long a model takes for a token of each of some rows on the CPU: as transformers writes, and as the engine does.

    python -m tests.benchmarks.token_steps MODEL

MODEL is a model directory. In float32 the engine multiplies few rows in another way, and in both number formats its cache of keys
and values grows in place. All ways are timed alternately in one process; the numbers are milliseconds per step. Run it a second
time with OMP_WAIT_POLICY=passive and GOMP_SPINCOUNT=1000, with which this project's processes wait.
"""

import argparse
import json
import os
import statistics
import sys
import time

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from resources.generation.few_rows import multiply_few_rows_faster
from resources.generation.growing_cache import growing_cache

ROWS = (1, 3, 8, 16, 40)
PROMPT_TOKENS, STEPS, ROUNDS = 100, 32, 3


def step_milliseconds(model: PreTrainedModel, cache: DynamicCache, rows: int) -> float:
    """Milliseconds per token step of so many rows, after a prompt and two steps that are not timed."""
    vocabulary = model.config.get_text_config().vocab_size
    with torch.inference_mode():
        model(torch.randint(0, vocabulary, (rows, PROMPT_TOKENS)), past_key_values=cache, logits_to_keep=1)
        for step in range(STEPS + 2):
            if step == 2:
                begun = time.perf_counter()
            model(torch.randint(0, vocabulary, (rows, 1)), past_key_values=cache)
    return 1000 * (time.perf_counter() - begun) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    directory = parser.parse_args().model
    ways = {}
    for number_format in ("float32", "bfloat16"):
        for whose in ("transformers", "engine"):
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, number_format)).eval()
            ways[f"{number_format}, {whose}"] = model
        multiply_few_rows_faster(ways[f"{number_format}, engine"])
    waiting = {name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    sys.stdout.write(json.dumps({"threads": torch.get_num_threads(), **waiting}) + "\n")
    for rows in ROWS:
        taken: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, model in ways.items():
                cache = growing_cache(model.config) if way.endswith("engine") else DynamicCache(config=model.config)
                taken[way].append(step_milliseconds(model, cache, rows))
        found = {way: round(statistics.median(each), 1) for way, each in taken.items()}
        sys.stdout.write(json.dumps({"rows": rows, **found}) + "\n")


if __name__ == "__main__":
    main()
