"""The scripts to run on a GPU do what they say, on a CPU and in the smallest sizes."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KIT = Path(__file__).parent / "benchmarks" / "gpu"
SMALL = ["--size=nano", "--rounds=1"]
TRAINING = [*SMALL, "--rows=8", "--batch=4", "--micro=2", "--repeat=1"]


@pytest.mark.parametrize("script", sorted(file.stem for file in KIT.glob("*.py")))
def test_the_names_that_a_script_uses_exist(script):
    importlib.import_module(f"tests.benchmarks.gpu.{script}")


@pytest.mark.slow
@pytest.mark.parametrize(("command", "expected"), [
    (["probe.py"], ["versions", "imports", "device"]),
    (
        ["gpu_checks.py", "agreement", "trainings", "memory", "fsdp", "out_of_memory"],
        ["agreement", "batches", "batches", *["trainings"] * 3, "memory", "fsdp", "out_of_memory"],
    ),
    (["gpu_generation.py", "transformers", *SMALL, "--prompts=8", "--tokens=8"], ["generation"]),
    (["gpu_training.py", "supervised", *TRAINING, "--full"], ["training"]),
    (["gpu_training.py", "preference", *TRAINING, "--four-bit"], ["training"]),
    (["gpu_training.py", "reward", *TRAINING], ["training"]),
    (["pipeline.py", "nano", "1", "transformers"], ["pipeline"]),
])  # fmt: skip
def test_a_script_says_what_it_found(tmp_path, nano_model, command, expected):
    models = tmp_path / "models"
    models.mkdir()
    (models / "taught").symlink_to(nano_model)
    (models / "nano-embedding").symlink_to(nano_model.parent / "nano-embedding")
    script, *arguments = command
    environment = os.environ | {"KIT_DEVICE": "cpu", "KIT_WORK": str(tmp_path), "OUT": str(tmp_path), "PYTHONPATH": "."}
    result = subprocess.run(
        [sys.executable, str(KIT / script), *arguments], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    found = [json.loads(line) for line in (tmp_path / "findings.jsonl").read_text().splitlines()]
    assert [finding["check"] for finding in found] == expected, result.stderr
    assert [finding for finding in found if not finding["ok"]] == [], result.stderr
