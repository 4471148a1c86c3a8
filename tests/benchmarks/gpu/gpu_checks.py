"""Small questions that only a GPU answers, each with lines of its own; a failure does not stop the others.

python tests/benchmarks/gpu/gpu_checks.py [agreement] [trainings] [memory] [fsdp] [out_of_memory]
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

import resources.common.progress
from resources.common.errors import FinalError
from resources.generation.language_model import LanguageModel
from resources.models.device import peak_memory
from resources.settings.machine import Engine
from resources.settings.method import Sampling
from resources.settings.training import TrainingProcesses
from resources.storage.checkpoint_store import Checkpoint
from resources.training.trainer import Trainer
from tests import test_accelerate as small
from tests.benchmarks import training
from tests.benchmarks.generation import prompts
from tests.benchmarks.gpu import gpu_training
from tests.benchmarks.gpu.common import DEVICE, WORK, checkpoint, random_model, say, taught
from tests.conftest import heard_by

SIZE, PROMPTS = ("nano", 8) if DEVICE == "cpu" else ("1b", 256)
FSDP = {
    "compute_environment": "LOCAL_MACHINE", "distributed_type": "FSDP", "num_machines": 1, "machine_rank": 0,
    "num_processes": 1, "mixed_precision": "bf16", "use_cpu": False,
    "fsdp_config": {
        "fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_reshard_after_forward": True,
        "fsdp_state_dict_type": "FULL_STATE_DICT", "fsdp_cpu_ram_efficient_loading": False,
    },
}  # fmt: skip


def answers(model: Checkpoint, count: int, sampling: Sampling, **engine: Any) -> list[str]:
    with tempfile.TemporaryDirectory() as shards:
        language_model = LanguageModel(shards=shards, engine=Engine(**engine), random_seed=1)
        return language_model.answer(model, prompts(count), sampling)[0]["text"].to_list()


def same_share(one: Sequence[str], other: Sequence[str]) -> float:
    return round(sum(a == b for a, b in zip(one, other, strict=True)) / len(one), 3)


def agreement() -> None:
    """Whether the GPU writes what the CPU writes, and whether a completion depends on its batch."""

    def written(temperature: float, dtype: str, device: str = DEVICE, batch_tokens: int = 16384) -> list[str]:
        sampling = Sampling(temperature=temperature, top_k=50, max_new_tokens=32)
        engine = {"kind": "transformers", "device": device, "dtype": dtype, "batch_tokens": batch_tokens}
        return answers(taught(), PROMPTS, sampling, **engine)

    cpu = written(0, "float32", device="cpu")
    shares = {dtype: same_share(cpu, written(0, dtype)) for dtype in ("float32", "bfloat16")}
    say("agreement", ok=shares["float32"] > 0.95, greedy_as_on_cpu=shares)
    for dtype in ("float32", "bfloat16"):
        first, again, small_batches = written(0.7, dtype), written(0.7, dtype), written(0.7, dtype, batch_tokens=400)
        same, independent = same_share(first, again), same_share(first, small_batches)
        # In bfloat16 the logits themselves depend on the batch.
        ok = same == 1 and (independent > 0.95 or dtype == "bfloat16")
        say("batches", ok=ok, dtype=dtype, same_again=same, same_in_small_batches=independent)


def trained(kind: str, work: Path, name: str, states: str, **changes: Any) -> list[float]:
    """The losses of a training of the tests, whose result lies under a name in the work folder."""
    trainer = Trainer(
        engine=Engine(device=DEVICE, threads=1), random_seed=1, states=str(work / states),
        processes=TrainingProcesses(save_every_steps=3),
    )  # fmt: skip
    summary = getattr(small, kind)(trainer, taught(), work / name, **changes)
    return [round(entry["loss"], 4) for entry in summary.history]


def trainings() -> None:
    """Each kind of training of the tests: again, resumed, and on weights in 4 bits."""
    # Every step is told, so that one of them can stop the training.
    resources.common.progress.LOG_EVERY_SECONDS = -1

    def stop(line: str) -> None:
        if line.startswith("Step 5 "):
            raise small.Stopped

    lora = small.LORA.model_copy(update={"dropout": 0.0, "load_in_4bit": True})
    for kind in ("sft", "simpo", "reward"):
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            losses = {"plain": trained(kind, work, "plain", "1"), "again": trained(kind, work, "again", "2")}
            with suppress(small.Stopped), heard_by(stop):
                trained(kind, work, "stopped", "3")
            losses |= {
                "resumed": trained(kind, work, "resumed", "3"),
                "4_bit": trained(kind, work, "4 bit", "4", lora=lora),
            }
            differences = {name: small.largest_difference(work / "plain", work / name) for name in ("again", "resumed")}
        if DEVICE == "cpu":
            ok = not any(differences.values())
        else:
            # Exact on a CPU only: a GPU adds up in any order.
            ok = all(abs(losses[name][-1] - losses["plain"][-1]) < 0.02 for name in differences)
        say("trainings", ok=ok, kind=kind, losses=losses, weights_differ_by=differences)


def memory() -> None:
    """The peak that the project counts compared with what nvidia-smi saw; vLLM's is in a process of its own."""
    model = checkpoint(random_model(SIZE))
    # vLLM first: its parent has then used no GPU.
    kinds = ["vllm", "transformers"] if importlib.util.find_spec("vllm") else ["transformers"]
    for kind in kinds:
        with watched_memory() as seen:
            answers(model, PROMPTS, Sampling(top_k=50, max_new_tokens=64), kind=kind, device=DEVICE)
        counted = peak_memory()
        fits = counted.get("peak_gpu_memory_gb", 0) <= max(seen, default=0)
        say("memory", ok=fits, engine=kind, counted=counted, nvidia_smi_gb=max(seen, default=None))


@contextmanager
def watched_memory() -> Iterator[list[float]]:
    """What nvidia-smi says is in use on the first GPU, in 10^9 bytes, three times a second; nothing on a CPU."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    seen: list[float] = []
    over = threading.Event()

    def watch() -> None:
        while DEVICE == "cuda" and not over.wait(0.3):
            mebibytes = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
            seen.append(round(float(mebibytes) * 2**20 / 1e9, 2))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def fsdp() -> None:
    """FSDP with one process, on adapters, on weights in 4 bits and on all weights: they must come out whole."""
    file = WORK / "fsdp.yaml"
    file.write_text(yaml.safe_dump(FSDP))
    command = [
        sys.executable,
        gpu_training.__file__,
        "preference",
        "--size=135m",
        "--rows=64",
        "--only=stage",
        "--verbose",
    ]
    for options in ([], ["--four-bit"], ["--full"]):
        # Its own line says whether they are whole.
        subprocess.run([*command, f"--accelerate={file}", *options], check=True)


def out_of_memory() -> None:
    """Too large a batch ends in one sentence and not in a traceback, in generation and in training."""
    model = checkpoint(random_model("1b"))
    sampling = Sampling(top_k=50, max_new_tokens=2048)
    how = gpu_training.settings(batch=512, micro=512, lora=None)
    rows = training.pairs(512, 8, gpu_training.ANSWER_LENGTH)
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(device=DEVICE)
        tries = {
            "generation": lambda: answers(model, 20000, sampling, kind="transformers", device=DEVICE, batch_tokens=200_000_000),
            "training": lambda: training.stage("preference", model.weights, rows, how, engine, Path(folder)),
        }  # fmt: skip
        for work, attempt in tries.items():
            started, sentence = time.monotonic(), None
            try:
                attempt()
            except FinalError as error:
                sentence = str(error)
            seconds = round(time.monotonic() - started, 1)
            say(
                "out_of_memory",
                ok="memory does not suffice" in (sentence or ""),
                work=work,
                sentence=sentence,
                seconds=seconds,
            )


CHECKS: dict[str, Callable[[], None]] = {
    check.__name__: check for check in (agreement, trainings, memory, fsdp, out_of_memory)
}
NEED_GPU = ("fsdp", "out_of_memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *CHECKS])
    for name in parser.parse_args().names or CHECKS:
        if DEVICE == "cpu" and name in NEED_GPU:
            say(name, ok=True, skipped="needs a GPU")
            continue
        try:
            CHECKS[name]()
        except Exception as error:
            traceback.print_exc()
            say(name, ok=False, failed=f"{type(error).__name__}: {error}"[:400])


if __name__ == "__main__":
    main()
