"""Seconds of the training stage against TRL called directly, on the same data with the same settings, in one run.

    python -m tests.benchmarks.training supervised
    python -m tests.benchmarks.training preference

Each way is timed in fresh processes, from chat messages to merged weights on disk, without imports. The ways take turns, so
that a busy machine disturbs both alike; the ratio is of medians over the rounds. TRL renders and tokenizes for itself, so
its token counts can differ by the end of an answer.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from resources.settings.machine import Engine
from resources.settings.training import PreferenceTraining, Training, TrainingProcesses
from resources.storage.checkpoint_store import Checkpoint
from resources.training.trainer import Trainer
from synpo_assets.method.templates import user_message
from tests.nano import make_nano_model, seed_rows

WAYS = ("raw", "stage")
KINDS = ("supervised", "preference")


def settings(last_layers: int | None) -> PreferenceTraining:
    return PreferenceTraining(
        learning_rate=1e-4, epochs=1, batch_size=4, micro_batch_size=4, max_length=192, max_prompt_length=96,
        max_completion_length=96, beta=2.0, lora={"rank": 16, "alpha": 32, "last_layers": last_layers},
    )  # fmt: skip


def pairs(count: int) -> list[dict[str, Any]]:
    rows = (seed_rows() * (count // 100 + 1))[:count]
    turned = rows[1:] + rows[:1]
    return [
        {
            "prompt": user_message(row["prompt"]),
            "chosen": [{"role": "assistant", "content": row["answer"][:300]}],
            "rejected": [{"role": "assistant", "content": other["answer"][:300]}],
            "chosen_finish_reason": "stop",
            "rejected_finish_reason": "stop",
        }
        for row, other in zip(rows, turned, strict=True)
    ]


def stage(kind: str, model: str, count: int, training: PreferenceTraining, threads: int, directory: Path) -> None:
    """What the assets call."""
    trainer = Trainer(
        engine=Engine(threads=threads), random_seed=1, processes=TrainingProcesses(), states=str(directory / "states")
    )
    start = Checkpoint("initial_policy", None, "start", model, model)
    rows = pairs(count)
    result = directory / "result"
    result.mkdir()
    if kind == "supervised":
        examples = [(row["prompt"], row["chosen"][0]["content"]) for row in rows]
        shared = training.model_dump(include=set(Training.model_fields))
        trainer.supervised(start, examples, Training.model_validate(shared), result, lambda message: None)
    else:
        trainer.preference(start, rows, training, result, lambda message: None)


def raw(kind: str, model: str, count: int, training: PreferenceTraining, threads: int, directory: Path) -> None:
    """A script of the kind that people write with TRL."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    layers = network.config.num_hidden_layers
    adapted = range(layers - (training.lora.last_layers or layers), layers)
    options = {
        "output_dir": str(directory / "trainer"), "learning_rate": training.learning_rate, "num_train_epochs": 1,
        "per_device_train_batch_size": training.micro_batch_size, "lr_scheduler_type": training.scheduler,
        "max_length": training.max_length, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "dataloader_pin_memory": False, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    if kind == "supervised":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs(count)]
        trainer_class, config = SFTTrainer, SFTConfig(**options, completion_only_loss=True)
    else:
        rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in pairs(count)]
        loss = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": training.beta, "simpo_gamma": training.gamma}
        trainer_class, config = CPOTrainer, CPOConfig(**options, **loss)
    trainer = trainer_class(
        model=network,
        args=config,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=training.lora.rank, lora_alpha=training.lora.alpha,
            target_modules=rf".*layers\.({'|'.join(map(str, adapted))})\..*_proj",
        ),
    )  # fmt: skip
    trainer.train()
    trainer.model.save_pretrained(directory / "adapter")
    trainer.model.merge_and_unload().save_pretrained(directory / "merged")
    tokenizer.save_pretrained(directory / "merged")


def seconds(arguments: argparse.Namespace, way: str, model: Path) -> float:
    """Seconds of a fresh process."""
    options = {"way": way, "model": model} | {name: getattr(arguments, name) for name in ("rows", "threads")}
    command = [sys.executable, "-m", "tests.benchmarks.training", arguments.kind]
    command += [f"--{name}={value}" for name, value in options.items()]
    command += [f"--last-layers={arguments.last_layers}"] if arguments.last_layers else []
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(result.stdout.splitlines()[-1])


def compare(arguments: argparse.Namespace, model: Path) -> dict[str, Any]:
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    loads = []
    for _ in range(arguments.rounds):
        for way in WAYS:
            loads.append(round(os.getloadavg()[0], 1))
            taken[way].append(round(seconds(arguments, way, model), 1))
    ratio = round(median(taken["raw"]) / median(taken["stage"]), 3)
    return {"kind": arguments.kind, "seconds": taken, "load of the machine before each": loads, "speed over raw": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--last-layers", type=int, help="Adapt the last k layers only.")
    parser.add_argument("--model", type=Path, help="A model directory; by default the nano model of the tests is made.")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        import datasets  # noqa: F401
        import peft  # noqa: F401
        import trl.experimental.cpo  # noqa: F401

        with tempfile.TemporaryDirectory() as directory:
            started = time.monotonic()
            train = {"raw": raw, "stage": stage}[arguments.way]
            train(
                arguments.kind, str(arguments.model), arguments.rows, settings(arguments.last_layers), arguments.threads,
                Path(directory),
            )  # fmt: skip
            print(time.monotonic() - started)  # noqa: T201
        return
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or make_nano_model(Path(folder) / "nano")
        print(json.dumps(compare(arguments, model), indent=2))  # noqa: T201


if __name__ == "__main__":
    main()
