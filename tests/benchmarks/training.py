"""Seconds of the training stage against TRL called directly, on the same data with the same settings, in one run.

    python -m tests.benchmarks.training supervised
    python -m tests.benchmarks.training preference
    python -m tests.benchmarks.training reward

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
from typing import Any, get_args

from resources.models.device import prepare_device, torch_dtype, trains_in_bfloat16
from resources.settings.machine import Engine
from resources.settings.training import PreferenceTraining, SimPO, TrainingProcesses
from resources.storage.checkpoint_store import Checkpoint
from resources.training.job import Kind, TrainingSummary
from resources.training.trainer import Trainer
from synpo_assets.method.templates import user_message
from tests.nano import make_nano_model, seed_rows

WAYS = ("raw", "stage")
TEXTS = ("prompt", "chosen", "rejected")
LOSS = SimPO(beta=2.0)


def settings(last_layers: int | None) -> PreferenceTraining:
    return PreferenceTraining(
        learning_rate=1e-4, epochs=1, batch_size=4, micro_batch_size=4, max_length=192, max_prompt_length=96,
        max_completion_length=96, lora={"rank": 16, "alpha": 32, "last_layers": last_layers},
    )  # fmt: skip


def pairs(count: int, repeat: int = 1, length: int = 300) -> list[dict[str, Any]]:
    """Pairs of the seed: its answers repeated, and cut to so many characters."""
    rows = (seed_rows() * (count // 100 + 1))[:count]
    answers = [[{"role": "assistant", "content": " ".join([row["answer"]] * repeat)[:length]}] for row in rows]
    finished = {"chosen_finish_reason": "stop", "rejected_finish_reason": "stop"}
    return [
        {"prompt": user_message(row["prompt"]), "chosen": answer, "rejected": other} | finished
        for row, answer, other in zip(rows, answers, answers[1:] + answers[:1], strict=True)
    ]


def stage(
    kind: Kind,
    model: str,
    rows: list[dict[str, Any]],
    training: PreferenceTraining,
    engine: Engine,
    directory: Path,
    processes: TrainingProcesses | None = None,
) -> TrainingSummary:
    """What the assets call."""
    states = str(directory / "states")
    trainer = Trainer(engine=engine, random_seed=1, processes=processes or TrainingProcesses(), states=states)
    start = Checkpoint("initial_policy", None, "start", model, model)
    examples = {
        "supervised": lambda row: (row["prompt"], row["chosen"][0]["content"]),
        "preference": lambda row: row,
        "reward": lambda row: tuple(row[part][-1]["content"] for part in TEXTS),
    }[kind]
    (result := directory / "result").mkdir()
    loss = LOSS if kind == "preference" else None
    return trainer.train(kind, start, [examples(row) for row in rows], training, result, loss)


def raw(
    kind: Kind,
    model: str,
    rows: list[dict[str, Any]],
    training: PreferenceTraining,
    engine: Engine,
    directory: Path,
    *,
    checkpointing: bool = True,
) -> None:
    """A script of the kind that people write with TRL; on a GPU with the autocast and checkpointing of the stage."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        BitsAndBytesConfig,
    )
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    on_gpu, lora, number_format = prepare_device(engine) == "cuda", training.lora, torch_dtype(engine)
    tokenizer = AutoTokenizer.from_pretrained(model)
    loading: dict[str, Any] = {"dtype": number_format if lora else torch.float32}
    if lora and lora.load_in_4bit:
        loading["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=number_format, bnb_4bit_quant_storage=number_format,
        )  # fmt: skip
    if kind == "reward":
        network = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, **loading)
    else:
        network = AutoModelForCausalLM.from_pretrained(model, **loading)
    options = {
        "output_dir": str(directory / "trainer"), "learning_rate": training.learning_rate, "num_train_epochs": 1,
        "per_device_train_batch_size": training.micro_batch_size, "lr_scheduler_type": training.scheduler,
        "gradient_accumulation_steps": training.batch_size // training.micro_batch_size,
        "max_length": training.max_length, "use_cpu": not on_gpu, "bf16": trains_in_bfloat16(engine, "cuda" if on_gpu else "cpu"),
        "gradient_checkpointing": on_gpu and checkpointing, "dataloader_pin_memory": on_gpu, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    if kind == "supervised":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
        trainer_class, config = SFTTrainer, SFTConfig(**options, completion_only_loss=True)
    else:
        rows = [{part: row[part] for part in TEXTS} for row in rows]
        loss = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": LOSS.beta, "simpo_gamma": LOSS.gamma}
        trainer_class, config = CPOTrainer, CPOConfig(**options, **loss)
        if kind == "reward":
            trainer_class, config = RewardTrainer, RewardConfig(**options)
    adapters = None
    if lora:
        layers = network.config.num_hidden_layers
        adapted = range(layers - (lora.last_layers or layers), layers)
        adapters = LoraConfig(
            task_type="SEQ_CLS" if kind == "reward" else "CAUSAL_LM", r=lora.rank, lora_alpha=lora.alpha,
            target_modules=rf".*layers\.({'|'.join(map(str, adapted))})\..*_proj",
            modules_to_save=["score"] if kind == "reward" else None,
        )  # fmt: skip
    trainer = trainer_class(
        model=network,
        args=config,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        peft_config=adapters,
    )
    trainer.train()
    trainer.save_model(str(directory / "saved"))
    # Weights in 4 bits would have to be loaded anew, as the stage does.
    if lora and not lora.load_in_4bit:
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
    parser.add_argument("kind", choices=get_args(Kind))
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
                arguments.kind, str(arguments.model), pairs(arguments.rows), settings(arguments.last_layers),
                Engine(threads=arguments.threads), Path(directory),
            )  # fmt: skip
            print(time.monotonic() - started)  # noqa: T201
        return
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or make_nano_model(Path(folder) / "nano")
        print(json.dumps(compare(arguments, model), indent=2))  # noqa: T201


if __name__ == "__main__":
    main()
