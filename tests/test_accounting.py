"""What assets record about their cost: tokens, time, and the most memory that their step needed."""

import subprocess
import sys

import pytest

from resources.settings.files import load_settings
from synpo_assets.graph.metrics import recorded
from synpo_assets.graph.stage import OPT_IN_TAG
from tests.stand_ins import services_in

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


def test_memory_that_is_free_again_is_counted_and_pytorch_is_not_loaded_for_it():
    figure = "print(peak_memory()['peak_memory_gb'])"
    before, after, *names, loaded = printed(figure, GRABBED, figure, "print(*peak_memory(), 'torch' in sys.modules)")
    assert (names, loaded) == (["peak_memory_gb"], "False")
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


def test_every_asset_that_uses_a_model_records_tokens_time_and_memory(nano_run):
    services = services_in(nano_run.home, load_settings(nano_run.home / "settings.yaml"))
    nodes = [services.graph.get(key) for key in services.graph.materializable_asset_keys]
    using = [node for node in nodes if node.pools and OPT_IN_TAG not in node.tags]
    assert len(using) > 10
    for node in using:
        name = node.key.to_user_string()
        metrics = recorded(services.metrics, "0002" if node.is_partitioned else None)

        def value(metric, metrics=metrics, name=name):
            return metrics.value(metric, asset=name)

        assert 0.1 < value("peak_memory_gb") < 10, name
        assert value("peak_gpu_memory_gb") is None
        work = {kind for kind in ("generates", "trains", "scores", "embeds") if f"synpo/{kind}" in node.tags}
        tokens = {
            "generates": "output_tokens",
            "trains": "trained_tokens",
            "scores": "scored_tokens",
            "embeds": "embedded_tokens",
        }
        for kind in work:
            assert value(tokens[kind]) > 0, (name, kind)
        seconds = ("generation_seconds", "training_seconds", "scoring_seconds", "embedding_seconds")
        assert any(value(each) for each in seconds), name
        assert (value("input_tokens") is None) == (value("output_tokens") is None)


def test_the_summary_of_a_run_shows_memory_within_80_columns(nano_run):
    printed = nano_run.result.stdout
    assert "peak GB" in printed
    assert max(len(line) for line in printed.splitlines() if line.startswith(("│", "┃"))) <= 80
