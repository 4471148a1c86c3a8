"""Seconds and memory of training: TRL called directly, and our stage, on the same data and settings.

    python tests/benchmarks/gpu/gpu_training.py supervised --size 1b --rows 512
    python tests/benchmarks/gpu/gpu_training.py preference --size 1b --rows 512
    python tests/benchmarks/gpu/gpu_training.py reward --size 135m --rows 512
    python tests/benchmarks/gpu/gpu_training.py preference --size 7b --rows 64 --four-bit

Raw TRL uses the same autocast, adapters and gradient checkpointing as our stage does on a GPU. With --no-checkpointing it
goes without the last, which shows what that costs.
"""

import argparse
import json
import logging
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import get_args

from resources.models.device import peak_memory
from resources.settings.machine import Engine
from resources.settings.training import Lora, PreferenceTraining, TrainingProcesses
from resources.training.job import Kind
from tests.benchmarks import training
from tests.benchmarks.gpu.common import AIM, DEVICE, SHAPES, in_turns, random_model, say

# Answers of so many characters are not cut.
ANSWER_LENGTH = 900


def settings(*, batch: int, micro: int, lora: Lora | None) -> PreferenceTraining:
    return PreferenceTraining(
        learning_rate=1e-4, batch_size=batch, micro_batch_size=micro, max_length=1024, max_prompt_length=448,
        max_completion_length=576, lora=lora,
    )  # fmt: skip


def shapes(folder: Path) -> dict[str, list[int]]:
    """Of all weights but those of the output."""
    from safetensors import safe_open

    opened = [safe_open(file, "pt") for file in folder.glob("*.safetensors")]
    names = [(file, name) for file in opened for name in file.keys() if name.startswith("model.")]  # noqa: SIM118
    return {name: file.get_slice(name).get_shape() for file, name in names}


def measure(arguments: argparse.Namespace) -> None:
    """One way, in this process."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import trl.experimental.cpo  # noqa: F401

    if arguments.verbose:
        logging.basicConfig(level=logging.INFO)
    lora = None if arguments.full else Lora(rank=16, alpha=32, load_in_4bit=arguments.four_bit)
    how = settings(batch=arguments.batch, micro=arguments.micro, lora=lora)
    rows = training.pairs(arguments.rows, arguments.repeat, ANSWER_LENGTH)
    train = {
        "raw": partial(training.raw, checkpointing=not arguments.no_checkpointing),
        "stage": partial(training.stage, processes=TrainingProcesses(accelerate_config=arguments.accelerate)),
    }[arguments.way]
    with tempfile.TemporaryDirectory() as directory:
        started = time.monotonic()
        train(arguments.kind, str(arguments.folder), rows, how, Engine(device=DEVICE), Path(directory))
        found = {"seconds": round(time.monotonic() - started, 1)} | peak_memory()
        if arguments.way == "stage":
            found["whole"] = shapes(arguments.folder) == shapes(Path(directory) / "result" / "merged")
    print(json.dumps(found))  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=get_args(Kind))
    parser.add_argument("--size", choices=SHAPES, default="1b")
    parser.add_argument("--folder", type=Path, help="A model directory in place of random weights.")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=8, help="How often an answer is repeated, to make it long.")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--full", action="store_true", help="All weights, no adapters.")
    parser.add_argument("--four-bit", action="store_true")
    parser.add_argument("--no-checkpointing", action="store_true", help="Raw TRL only.")
    parser.add_argument("--accelerate", help="A file for training_processes.accelerate_config; our stage only.")
    parser.add_argument("--only", choices=training.WAYS)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--way", choices=training.WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        measure(arguments)
        return
    ways = [arguments.only] if arguments.only else training.WAYS
    taken = in_turns(ways, arguments.rounds, arguments.folder or random_model(arguments.size))
    complete = all(len(of_way) == arguments.rounds for of_way in taken.values())
    whole = all(one["whole"] for one in taken.get("stage", []))
    middle = {way: median(one["seconds"] for one in of_way) for way, of_way in taken.items() if of_way}
    ratio = round(middle["raw"] / middle["stage"], 3) if complete and len(ways) > 1 else None
    options = ("kind", "size", "rows", "four_bit", "full", "no_checkpointing", "accelerate")
    say(
        "training", ok=complete and whole, taken=taken, speed_over_raw=ratio, aim=AIM,
        **{name: getattr(arguments, name) for name in options},
    )  # fmt: skip


if __name__ == "__main__":
    main()
