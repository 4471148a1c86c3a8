"""A run that is killed with -9 leaves no process and no pool slot behind, and the next one goes on: `pytest -n 0 -m slow`."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import polars as pl
import pytest

from tests.conftest import synpo
from tests.nano import nano_settings, write_settings
from tests.ui import Ui, free_port, processes_of, wait_for

pytestmark = pytest.mark.slow


@contextmanager
def run_that_generates(tmp_path, nano_model):
    """`synpo run` on a new home, from the moment that its first shard is finished."""
    home = tmp_path / "home"
    settings = write_settings(tmp_path / "nano.yaml", nano_settings(nano_model))
    command = [str(Path(sys.executable).with_name("synpo")), "run", "--settings", str(settings), "--home", str(home)]
    environment = {name: value for name, value in os.environ.items() if name not in ("SYNPO_HOME", "DAGSTER_HOME")}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while not list((home / "shards").glob("*/*.parquet")):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        yield home, process


def test_a_killed_run_ends_whole_and_the_next_one_goes_on(tmp_path, nano_model):
    with run_that_generates(tmp_path, nano_model) as (home, process):
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while processes_of(home) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_of(home) == {}
    saved = {file: file.stat().st_mtime for file in home.glob("shards/*/*.parquet")}
    result = synpo("run", "--home", home)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "finished earlier and are reused" in result.stderr
    assert {file: file.stat().st_mtime for file in saved} == saved
    assert pl.read_parquet(home / "tables/evaluation/0001.parquet").height == 6
    assert list(home.rglob("*.tmp")) == []


@pytest.mark.parametrize("seconds", [0, 3, 12])
def test_a_run_that_is_killed_while_it_starts_leaves_nothing_at_work(tmp_path, nano_model, seconds):
    """Neither the process that steps are forked from, which imports for seconds, nor a step that uses no model."""
    home, settings = tmp_path / "home", write_settings(tmp_path / "nano.yaml", nano_settings(nano_model))
    command = [Path(sys.executable).with_name("synpo"), "run", "--settings", settings, "--home", home]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (home / "dagster.yaml").exists():
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 5
    while processes_of(home) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of(home) == {}


def test_a_foreground_run_that_is_terminated_in_the_ui_ends_within_30_seconds(tmp_path, nano_model):
    """The UI can only mark it as cancelling; the process watches for that."""
    with (
        run_that_generates(tmp_path, nano_model) as (home, process),
        dg.DagsterInstance.from_config(str(home)) as instance,
    ):
        (run,) = instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED]))
        instance.report_run_canceling(run)
        process.wait(30)
        assert instance.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.CANCELED
    deadline = time.monotonic() + 10
    while processes_of(home) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_of(home) == {}
    assert synpo("run", "--home", home).returncode == 0


@pytest.mark.parametrize(("told", "how", "says"), [
    ("synpo ui", signal.SIGTERM, ""),
    ("synpo ui", signal.SIGKILL, ""),
    ("dagster._daemon run", signal.SIGKILL, "The daemon of the UI was killed"),
    ("synpo_assets.cli.webserver", signal.SIGKILL, "The web server of the UI was killed"),
])  # fmt: skip
def test_a_ui_that_a_script_started_in_the_background_ends_whole(tmp_path, nano_model, told, how, says):
    """Such a script has what it starts ignore SIGINT."""
    home, port = tmp_path / "home", free_port()
    settings = write_settings(tmp_path / "nano.yaml", nano_settings(nano_model))
    synpo_ui = [str(Path(sys.executable).with_name("synpo")), "ui", "--settings", settings, "--home", home]
    with (
        open(tmp_path / "said.txt", "w") as said,
        subprocess.Popen(
            [*synpo_ui, "--port", str(port)],
            stdout=said,
            stderr=said,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        ) as process,
    ):
        try:
            ui = Ui(home, port)
            wait_for(ui.is_ready, 120)
            ui.launch(None, ["initial_policy", "seed_pairs", "keyword_pool", "prompt_generator"])
            wait_for(lambda: any("forkserver" in command for command in processes_of(home).values()), 60)
            commands = processes_of(home) | {process.pid: "synpo ui"}
            (victim,) = [number for number, command in commands.items() if told in command]
            os.kill(victim, how)
            process.wait(60)
        finally:
            process.kill()
    # Code servers stay a moment longer, and say what became of the run.
    wait_for(lambda: not any("multiprocessing.spawn" in command for command in processes_of(home).values()), 8, 0.1)
    wait_for(lambda: not processes_of(home), 15)
    assert says in (tmp_path / "said.txt").read_text()
    # Whoever is left last reports it: in a history that machines share, the next command could not.
    with dg.DagsterInstance.from_config(str(home)) as instance:
        (run,) = instance.get_runs()
        assert run.is_finished
