"""How long a model takes for a token of each of a few rows on the CPU: as torch multiplies, and as the engine does.

    python -m tests.benchmarks.few_rows MODEL

MODEL is a model directory. Both ways are timed alternately in one process; the numbers are milliseconds per step. Run it a second
time with OMP_WAIT_POLICY=passive, with which this project's processes wait.
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

ROWS = (1, 3, 8, 16, 40)
PROMPT_TOKENS, STEPS, ROUNDS = 100, 32, 3


def step_milliseconds(model: PreTrainedModel, rows: int) -> float:
    """Milliseconds per token step of so many rows, after a prompt and two steps that are not timed."""
    cache, vocabulary = DynamicCache(config=model.config), model.config.get_text_config().vocab_size
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
    ways = {
        way: AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval() for way in ("torch", "engine")
    }
    multiply_few_rows_faster(ways["engine"])
    waiting = os.environ.get("OMP_WAIT_POLICY", "active")
    sys.stdout.write(json.dumps({"threads": torch.get_num_threads(), "waiting": waiting}) + "\n")
    for rows in ROWS:
        rounds = [{way: step_milliseconds(model, rows) for way, model in ways.items()} for _ in range(ROUNDS)]
        found = {way: round(statistics.median(each[way] for each in rounds), 1) for way in ways}
        ratio = round(found["torch"] / found["engine"], 2)
        sys.stdout.write(json.dumps({"rows": rows, **found, "ratio": ratio}) + "\n")


if __name__ == "__main__":
    main()
