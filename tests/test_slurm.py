"""A batch job that continues: what the example script does with signals, and what `synpo run` does."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from synpo_assets.cli.home import interruptible

SCRIPT = Path(__file__).parents[1] / "resources/deployment/slurm.sh"


def test_a_run_that_a_script_started_in_the_background_ends_at_sigterm(tmp_path):
    """A shell has such a program ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)

    def work():
        with interruptible(tmp_path, 2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    try:
        with pytest.raises(KeyboardInterrupt, match=r"Finished work is kept.*--iterations 2"):
            work()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def program(folder, name, text):
    file = folder / name
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(0o755)


@pytest.mark.parametrize(("number", "said", "code"), [
    (signal.SIGUSR1, "run ended\nrequeue 7\n", 0), (signal.SIGTERM, "run ended\n", 143),
])  # fmt: skip
def test_the_job_ends_its_run_and_requeues_itself_when_its_time_is_up(tmp_path, number, said, code):
    log = tmp_path / "log"
    program(tmp_path, "scontrol", f'echo "$@" >> {log}')
    program(
        tmp_path,
        "synpo",
        f"trap 'echo run ended >> {log}; exit 1' TERM; touch {tmp_path}/begun; while :; do sleep 0.05; done",
    )
    told = os.environ | {
        "SYNPO": str(tmp_path / "synpo"),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
    }
    with subprocess.Popen(["bash", str(SCRIPT)], env=told) as job:
        while not (tmp_path / "begun").exists():
            time.sleep(0.05)
        job.send_signal(number)
        assert job.wait(timeout=30) == code
    assert log.read_text() == said
