"""What assets record about their cost: tokens, time, and the most memory that their step needed."""

import subprocess
import sys

import dagster as dg
import pytest

from synpo_assets.graph.history import metadata_of

MEBIBYTES = 400
GRABBED = f"grabbed = bytearray({MEBIBYTES} * 2**20); grabbed[::4096] = bytes(len(grabbed[::4096])); del grabbed"
# A program inherits the record of the one that starts it, here of pytest; a forked process does not.
START = """
import os, subprocess, sys
from resources.models.device import peak_memory
if os.fork():
    os.wait()
    sys.exit()
"""


def printed(*lines):
    """What a program prints in a process of its own: memory that was needed once stays on record."""
    code = "\n".join([START, *lines])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_memory_that_is_free_again_is_counted():
    before, after = printed("print(peak_memory()['peak_memory_gb'])", GRABBED, "print(peak_memory()['peak_memory_gb'])")
    assert float(after) - float(before) == pytest.approx(MEBIBYTES * 2**20 / 1e9, abs=0.05)


def test_memory_of_a_process_that_was_started_is_counted():
    child = f"subprocess.run([sys.executable, '-c', {GRABBED!r}], check=True)"
    (peak,) = printed(child, "print(peak_memory()['peak_memory_gb'])")
    assert float(peak) > MEBIBYTES * 2**20 / 1e9


def test_a_forked_step_does_not_answer_for_the_process_it_was_forked_from():
    parent, child = printed(
        GRABBED,
        "print(peak_memory()['peak_memory_gb'], flush=True)",
        "if os.fork() == 0:",
        "    print(peak_memory()['peak_memory_gb'], flush=True)",
        "    os._exit(0)",
        "os.wait()",
    )
    assert float(parent) - float(child) > 0.3


def test_memory_is_counted_without_loading_pytorch():
    figures, loaded = printed("print(*peak_memory())", "print('torch' in sys.modules)")
    assert (figures, loaded) == ("peak_memory_gb", "False")


@pytest.mark.parametrize("asset", [
    "prompt_generator", "self_instruct_prompts", "reward_model", "judge_model", "prompt_diversity",
    "seed_responses", "response_improver", "synthetic_prompts", "base_responses",
    "initial_responses", "refined_responses", "preference_pairs", "model_checkpoint", "evaluation",
    "instruction_following", "gold_comparison",
])  # fmt: skip
def test_every_asset_that_uses_a_model_shows_tokens_time_and_memory(nano_run, asset):
    once = ("prompt_generator", "self_instruct_prompts", "reward_model", "judge_model")
    with dg.DagsterInstance.from_config(str(nano_run.home)) as instance:
        partition = None if asset in once else "0002"
        about = metadata_of(instance, asset, partition)
    assert 0.1 < about["peak_memory_gb"] < 10
    assert "peak_gpu_memory_gb" not in about
    assert any(about.get(name) for name in ("output_tokens", "tokens", "scored_tokens"))
    assert about.get("seconds") or about.get("scoring_seconds")
    assert ("input_tokens" in about) == ("output_tokens" in about)


def test_the_summary_of_a_run_shows_memory_within_80_columns(nano_run):
    printed = nano_run.result.stdout
    assert "peak GB" in printed
    assert max(len(line) for line in printed.splitlines() if line.startswith(("│", "┃"))) <= 80
