"""A run's steps of the pool follow each other at once, and its process ends soon after it was told to."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.execution.plan import instance_concurrency_context

from synpo_assets.cli import executor
from synpo_assets.graph.changes import run_resources
from synpo_assets.graph.stage import GPU_POOL
from tests.stand_ins import services_in
from tests.step_jobs import job_killed_late, job_of_the_pool
from tests.ui import wait_for

WAITS = 4.0
ONE_AT_A_TIME = {"concurrency": {"pools": {"default_limit": 1}}}


@pytest.mark.parametrize("is_a_step", [False, True])
def test_only_the_process_of_a_step_is_ended_after_an_interrupt(tmp_path, monkeypatch, is_a_step):
    listening = []

    @dg.asset(required_resource_keys={"services"})
    def looking() -> None:
        number = signal.set_wakeup_fd(-1)
        listening.append(number >= 0)
        signal.set_wakeup_fd(number)

    monkeypatch.setattr("multiprocessing.parent_process", lambda: object() if is_a_step else None)
    services = services_in(tmp_path)
    resources = run_resources(services, lambda *_: services)
    del resources["io_manager"]
    assert dg.materialize([looking], instance=dg.DagsterInstance.ephemeral(), resources=resources).success
    assert listening == [is_a_step]


def test_a_run_ends_soon_after_it_was_told_to_though_a_step_never_hears_of_it(tmp_path):
    """Dagster waits until a step has heard; one that is stopped does not hear, nor does one that was killed in that moment."""
    step, said = tmp_path / "step", tmp_path / "said"
    code = "from tests.step_jobs import run_endless_job; run_endless_job()"
    environment = os.environ | {"STEP": str(step), "HOME_OF_RUN": str(tmp_path)}
    with (
        said.open("wb") as file,
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stderr=file, cwd=Path(__file__).parents[1]
        ) as run,
    ):
        process_id = int(wait_for(lambda: step.exists() and step.read_text()))
        os.kill(process_id, signal.SIGSTOP)
        run.terminate()
        try:
            run.wait(20)
        finally:
            run.kill()
            os.kill(process_id, signal.SIGKILL)
    assert run.returncode == 1
    assert "did not end within 1 s of being told to" in said.read_text()


@pytest.mark.parametrize(("warnings", "says"), [({}, False), ({"PYTHONWARNINGS": "default"}, True)])
def test_python_does_not_say_that_it_removes_what_a_run_left_in_shared_memory(warnings, says):
    """Unless somebody asks for warnings."""
    leaves = "import multiprocessing as m, os, synpo_assets.cli.executor; e = m.get_context('forkserver').Event(); os._exit(0)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"} | warnings
    # Returns when the process that removes it has ended too.
    said = subprocess.run([sys.executable, "-c", leaves], env=environment, capture_output=True, text=True, timeout=60)
    assert ("leaked semaphore" in said.stderr) == says


def test_a_step_whose_process_is_killed_after_it_has_ended_does_not_end_again(tmp_path, monkeypatch):
    monkeypatch.setattr(executor, "PRELOADED", ["tests.step_jobs"])
    with (
        dg.DagsterInstance.local_temp(str(tmp_path)) as instance,
        dg.execute_job(dg.reconstructable(job_killed_late), instance) as result,
    ):
        assert {event.step_key for event in result.get_step_success_events()} == {"killed_late", "after_it"}
        (failed,) = result.get_failed_step_keys()
        assert (failed, result.retry_attempts_for_node(failed)) == ("fails_twice", 1)


def test_a_run_that_waits_for_what_another_holds_takes_no_core(tmp_path, monkeypatch):
    monkeypatch.setattr(instance_concurrency_context, "INITIAL_INTERVAL_VALUE", 0.5)
    monkeypatch.setattr(executor, "PRELOADED", ["tests.step_jobs"])
    with dg.DagsterInstance.local_temp(str(tmp_path), ONE_AT_A_TIME) as instance:
        storage = instance.event_log_storage
        storage.set_concurrency_slots(GPU_POOL, 1)
        assert storage.claim_concurrency_slot(GPU_POOL, "another run", "its step").is_claimed
        threading.Timer(WAITS, storage.free_concurrency_slots_for_run, ["another run"]).start()
        began, worked = time.monotonic(), time.thread_time()
        with dg.execute_job(dg.reconstructable(job_of_the_pool), instance) as result:
            assert result.success
        assert time.monotonic() - began > WAITS
        assert time.thread_time() - worked < WAITS / 2


def test_steps_of_the_pool_follow_each_other_at_once(tmp_path, monkeypatch):
    """Whoever found the pool full would ask again after the time that is so long here."""
    monkeypatch.setattr(instance_concurrency_context, "INITIAL_INTERVAL_VALUE", 60)
    monkeypatch.setattr(instance_concurrency_context, "MAX_CONCURRENCY_CLAIM_BLOCKED_INTERVAL", 60)
    monkeypatch.setattr(executor, "PRELOADED", ["tests.step_jobs"])
    with (
        dg.DagsterInstance.local_temp(str(tmp_path), ONE_AT_A_TIME) as instance,
        dg.execute_job(dg.reconstructable(job_of_the_pool), instance) as result,
    ):
        assert result.success
        stats = sorted((each.start_time, each.end_time) for each in instance.get_run_step_stats(result.run_id))
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(stats))
    assert stats[-1][1] - stats[0][0] < 30
