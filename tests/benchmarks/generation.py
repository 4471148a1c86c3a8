"""Tokens per second of the generation stage against the library below it, on the same prompts, in one run.

    python -m tests.benchmarks.generation transformers
    python -m tests.benchmarks.generation vllm
    python -m tests.benchmarks.generation transformers --peer PYTHON

The last also times distilabel (see distilabel_peer.py), whose environment has the given Python.

Each way of generating is timed in fresh processes, from the chat messages to the last completion, without the loading of
the model. The ways take turns, so that a busy machine disturbs all alike; ratios are of medians over the rounds.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import resources.generation.language_model
from resources.generation.engine import Completion, Requests
from resources.generation.engine_choice import engine_fingerprint, open_engine
from resources.generation.vllm_engine import CPU_ARGUMENTS, CPU_ENVIRONMENT, ENVIRONMENT, WORTH_COMPILING
from resources.models.chat import load_tokenizer, prompt_ids
from resources.models.device import dtype_name, prepare_device, torch_dtype
from resources.settings.machine import Engine
from resources.settings.method import Sampling
from resources.storage.checkpoint_store import Checkpoint
from tests.nano import make_nano_model, prompt_table, seed_rows

BATCH_TOKENS = 16384
WAYS = ("raw", "engine", "stage")
PEER = "distilabel"
TEMPERATURE, TOP_K = 0.7, 50


def prompts(count: int) -> list[tuple[str, list[dict[str, str]]]]:
    words = " ".join(row["prompt"] for row in seed_rows()).split()
    texts = [" ".join(words[7 * n % len(words) :][: 8 + n % 24]) for n in range(count)]
    return [(str(n), [{"role": "user", "content": text}]) for n, text in enumerate(texts)]


class Stopwatch:
    """An engine that notes how long it took to load."""

    def __init__(self, checkpoint: Checkpoint, engine: Engine) -> None:
        self.started = time.monotonic()
        self.engine = open_engine(checkpoint, engine)
        self.loaded = time.monotonic()

    def generate(self, requests: Requests, sampling: Sampling) -> Iterator[list[Completion]]:
        with contextlib.closing(self.engine.generate(requests, sampling)) as batches:
            for batch in batches:
                self.loaded = self.loaded if batch else time.monotonic()
                yield batch


def rendered(model: str, count: int) -> list[list[int]]:
    tokenizer = load_tokenizer(model)
    return [prompt_ids(tokenizer, messages) for _, messages in prompts(count)]


def engine_alone(model: str, count: int, sampling: Sampling, settings: Engine) -> tuple[int, float]:
    """The engine without shards, rows and usage."""
    engine = Stopwatch(Checkpoint("initial_policy", None, "nano", model, model), settings)
    asked = Requests(*prompt_table(enumerate(rendered(model, count))))
    tokens = sum(done.output_tokens for batch in engine.generate(asked, sampling) for done in batch)
    return tokens, time.monotonic() - engine.loaded


def stage(model: str, count: int, sampling: Sampling, settings: Engine) -> tuple[int, float]:
    """What the assets call: rendering, engine, seeds, shards, rows in order, usage."""
    opened: list[Stopwatch] = []

    def open_stopwatch(*arguments: Any) -> Stopwatch:
        opened.append(Stopwatch(*arguments))
        return opened[0]

    resources.generation.language_model.open_engine = open_stopwatch
    # Imports torch and transformers, which is loading too.
    load_tokenizer(model)
    engine_fingerprint(settings, "initial_policy")
    checkpoint = Checkpoint("initial_policy", None, "nano", model, model)
    with tempfile.TemporaryDirectory() as shards:
        language_model = resources.generation.language_model.LanguageModel(
            shards=shards, engine=settings, random_seed=1
        )
        started = time.monotonic()
        _, usage = language_model.answer(checkpoint, prompts(count), sampling)
        ended = time.monotonic()
    return usage.generated_tokens, ended - started - (opened[0].loaded - opened[0].started)


def raw_transformers(model: str, count: int, sampling: Sampling, settings: Engine) -> tuple[int, float]:
    import torch
    from transformers import AutoModelForCausalLM

    device = prepare_device(settings)
    tokenizer = load_tokenizer(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch_dtype(settings)).to(device).eval()
    started, tokens = time.monotonic(), 0
    waiting = sorted(rendered(model, count), key=len, reverse=True)
    while waiting:
        rows = max(1, settings.batch_tokens // (len(waiting[0]) + sampling.max_new_tokens))
        batch, waiting = waiting[:rows], waiting[rows:]
        padded = tokenizer.pad({"input_ids": batch}, padding_side="left", return_tensors="pt").to(device)
        with torch.inference_mode():
            output = network.generate(
                **padded, do_sample=True, temperature=sampling.temperature, top_k=sampling.top_k,
                max_new_tokens=sampling.max_new_tokens, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        written = output[:, padded["input_ids"].shape[1] :]
        tokenizer.batch_decode(written, skip_special_tokens=True)
        tokens += int((written != tokenizer.pad_token_id).sum())
    return tokens, time.monotonic() - started


def raw_vllm(
    model: str, count: int, sampling: Sampling, settings: Engine, *, detokenize: bool = True
) -> tuple[int, float]:
    on_cpu = prepare_device(settings) == "cpu"
    threads = {"OMP_NUM_THREADS": str(settings.threads or os.cpu_count())}
    os.environ |= ENVIRONMENT | (CPU_ENVIRONMENT | threads if on_cpu else {})
    from vllm import LLM, SamplingParams, TokensPrompt

    longest = max(map(len, rendered(model, count))) + sampling.max_new_tokens
    # As the stage chooses, so that both do the same.
    own = CPU_ARGUMENTS if on_cpu else {"enforce_eager": count * sampling.max_new_tokens < WORTH_COMPILING}
    engine = LLM(
        model, dtype=dtype_name(settings), max_model_len=longest,
        max_num_batched_tokens=max(settings.batch_tokens, longest), disable_log_stats=True,
        **own | settings.vllm_arguments,
    )  # fmt: skip
    options = {"temperature": sampling.temperature, "top_k": sampling.top_k, "max_tokens": sampling.max_new_tokens}
    started = time.monotonic()
    outputs = engine.generate(
        [TokensPrompt(prompt_token_ids=ids) for ids in rendered(model, count)],
        [SamplingParams(seed=number, detokenize=detokenize, **options) for number in range(count)],
        use_tqdm=False,
    )
    return sum(len(output.outputs[0].token_ids) for output in outputs), time.monotonic() - started


def peer_rate(arguments: argparse.Namespace, model: Path) -> float:
    """Tokens per second of distilabel, in its own environment."""
    job = {
        "model": str(model), "prompts": [messages for _, messages in prompts(arguments.prompts)], "tokens": arguments.tokens,
        "threads": arguments.threads, "rows_at_a_time": 50, "temperature": TEMPERATURE, "top_k": TOP_K,
    }  # fmt: skip
    command = [arguments.peer, str(Path(__file__).with_name("distilabel_peer.py"))]
    result = subprocess.run(command, check=True, input=json.dumps(job), stdout=subprocess.PIPE, text=True)
    tokens, seconds = json.loads(result.stdout.splitlines()[-1])
    return tokens / seconds


def rate(arguments: argparse.Namespace, way: str, model: Path) -> float:
    """Tokens per second of a fresh process."""
    if way == PEER:
        return peer_rate(arguments, model)
    options = {"way": way, "model": model} | {
        name: getattr(arguments, name) for name in ("prompts", "tokens", "threads")
    }
    command = [sys.executable, "-m", "tests.benchmarks.generation", arguments.library]
    command += [f"--{name}={value}" for name, value in options.items()]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    tokens, seconds = json.loads(result.stdout.splitlines()[-1])
    return tokens / seconds


def compare(arguments: argparse.Namespace, model: Path) -> dict[str, Any]:
    ways = (*WAYS, PEER) if arguments.peer else WAYS
    rates: dict[str, list[float]] = {way: [] for way in ways}
    loads = []
    for _ in range(arguments.rounds):
        for way in ways:
            loads.append(round(os.getloadavg()[0], 1))
            rates[way].append(round(rate(arguments, way, model)))
    return {
        "library": arguments.library,
        "tokens per second": rates,
        "load of the machine before each": loads,
        "ratio to raw": {way: round(median(rates[way]) / median(rates["raw"]), 3) for way in ways[1:]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=["transformers", "vllm"])
    parser.add_argument("--prompts", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, help="A model directory; by default the nano model of the tests is made.")
    parser.add_argument("--peer", help="The Python of an environment with distilabel 1.5.3.")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        sampling = Sampling(temperature=TEMPERATURE, top_k=TOP_K, max_new_tokens=arguments.tokens)
        engine = Engine(kind=arguments.library, threads=arguments.threads, batch_tokens=BATCH_TOKENS)
        raw = raw_vllm if arguments.library == "vllm" else raw_transformers
        way = {"raw": raw, "engine": engine_alone, "stage": stage}[arguments.way]
        print(json.dumps(way(str(arguments.model), arguments.prompts, sampling, engine)))  # noqa: T201
        return
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or make_nano_model(Path(folder) / "nano")
        print(json.dumps(compare(arguments, model), indent=2))  # noqa: T201


if __name__ == "__main__":
    main()
