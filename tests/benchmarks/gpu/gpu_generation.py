"""Tokens per second and memory of generation: the library alone, our engine, our stage. Fresh processes, in turns.

    python tests/benchmarks/gpu/gpu_generation.py transformers --size 1b --prompts 1024 --tokens 256 --top-k 50
    python tests/benchmarks/gpu/gpu_generation.py vllm --size 1b --prompts 4096 --tokens 256

Models of random weights hardly ever end an answer early. Without --top-k the whole vocabulary is sampled from, as the
presets single_gpu and paper_* do. vLLM's memory is not in our figures: it has a process of its own.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from statistics import median

from resources.models.device import peak_memory
from resources.settings.machine import Engine
from resources.settings.method import Sampling
from tests.benchmarks import generation
from tests.benchmarks.gpu.common import AIM, DEVICE, SHAPES, in_turns, random_model, say


def measure(arguments: argparse.Namespace) -> None:
    """One way, in this process."""
    raw = generation.raw_transformers
    if arguments.library == "vllm":
        raw = partial(generation.raw_vllm, detokenize=arguments.detokenize)
    way = {"raw": raw, "engine": generation.engine_alone, "stage": generation.stage}[arguments.way]
    sampling = Sampling(temperature=0.7, top_k=arguments.top_k, max_new_tokens=arguments.tokens)
    engine = Engine(
        kind=arguments.library, device=DEVICE, batch_tokens=arguments.batch_tokens, vllm_arguments=arguments.vllm
    )
    tokens, seconds = way(str(arguments.folder), arguments.prompts, sampling, engine)
    print(json.dumps({"tokens": tokens, "seconds": round(seconds, 2)} | peak_memory()))  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=["transformers", "vllm"])
    parser.add_argument("--size", choices=SHAPES, default="1b")
    parser.add_argument("--folder", type=Path, help="A model directory in place of random weights.")
    parser.add_argument("--prompts", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--batch-tokens", type=int, default=65536)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--vllm", type=json.loads, default={}, help="Further arguments of vLLM, as JSON.")
    parser.add_argument("--detokenize", action="store_true", help="Raw vLLM decodes as it goes, as its users have it.")
    parser.add_argument("--way", choices=generation.WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        measure(arguments)
        return
    taken = in_turns(generation.WAYS, arguments.rounds, arguments.folder or random_model(arguments.size))
    complete = all(len(of_way) == arguments.rounds for of_way in taken.values())
    rates = {way: [round(one["tokens"] / one["seconds"]) for one in of_way] for way, of_way in taken.items()}
    ratios = (
        {way: round(median(rates[way]) / median(rates["raw"]), 3) for way in generation.WAYS[1:]} if complete else None
    )
    say(
        "generation", ok=complete, library=arguments.library, size=arguments.size, prompts=arguments.prompts,
        tokens=arguments.tokens, top_k=arguments.top_k, tokens_per_second=rates, ratio_to_raw=ratios, aim=AIM, taken=taken,
    )  # fmt: skip


if __name__ == "__main__":
    main()
