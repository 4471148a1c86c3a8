"""Processes that do not listen to an interrupt end all the same, and none outlives its run."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from resources.common import processes


def deaf_step(ready, listens):
    heard = []
    signal.signal(signal.SIGINT, lambda *_: heard.append(1))
    with processes.ended_after_interrupt(0.5, 0.5):
        ready.set()
        while not (listens and heard):
            time.sleep(0.05)
    # What comes after the block may take as long as it likes.
    time.sleep(1.5)


def ended_after(listens):
    context = multiprocessing.get_context("forkserver")
    ready = context.Event()
    process = context.Process(target=deaf_step, args=(ready, listens))
    process.start()
    assert ready.wait(60)
    started = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    return process.exitcode, time.monotonic() - started


def test_a_step_that_swallows_interrupts_is_ended_after_two_grace_periods():
    code, seconds = ended_after(listens=False)
    assert code == 1
    assert seconds >= 1.0


def test_a_step_that_listens_ends_by_itself():
    assert ended_after(listens=True)[0] == 0


REMOVES = """
import signal, time
{imports}
from resources.common.processes import ended_after_interrupt

class Removed:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

def told(*_):
    raise {interrupt}

signal.signal(signal.SIGINT, told)
try:
    with ended_after_interrupt(60):
        {block}
    time.sleep(30)
    print("not heard")
except {interrupt}:
    print("heard")
"""
BLOCKS = {
    "within the block": "Removed(); time.sleep(30)",
    "as the last thing of it": "Removed()",
    "in a block of it": "\n        with ended_after_interrupt(60): Removed()\n        time.sleep(30)",
}


IMPORTED = {
    "KeyboardInterrupt": "",
    "DagsterExecutionInterruptedError": "from dagster import DagsterExecutionInterruptedError",
}


@pytest.mark.parametrize("interrupt", IMPORTED)
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_an_interrupt_that_comes_while_python_removes_an_object_is_not_lost(block, interrupt):
    code = REMOVES.format(block=block, interrupt=interrupt, imports=IMPORTED[interrupt])
    removes = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (removes.stdout, removes.stderr) == ("heard\n", "")


def test_after_the_block_signals_are_told_to_whom_they_were_before():
    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    with processes.ended_after_interrupt(60):
        pass
    assert signal.set_wakeup_fd(before) == before


def step(watched, process_id):
    if watched:
        processes.end_with_run()
    process_id.value = os.getpid()
    # Does not give way to other threads, as a long call into C does not; it never ends by itself.
    while True:
        pass


RUN = """
import multiprocessing, time
from tests.test_processes import step

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    process_id = context.Value("i", 0)
    context.Process(target=step, args=({watched}, process_id), daemon=False).start()
    while not process_id.value:
        time.sleep(0.01)
    print(process_id.value, flush=True)
    time.sleep(60)
"""


def is_alive(process_id):
    try:
        return "Z" not in Path(f"/proc/{process_id}/stat").read_text().split(")")[1].split()[0]
    except FileNotFoundError:
        return False


def step_of_a_killed_run(watched, seconds):
    """Whether a step still runs so long after its run was killed with -9; it is ended then."""
    code = RUN.format(watched=watched)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    ) as run:
        process_id = int(run.stdout.readline())
        run.kill()
    deadline = time.monotonic() + seconds
    while is_alive(process_id) and time.monotonic() < deadline:
        time.sleep(0.05)
    if alive := is_alive(process_id):
        os.kill(process_id, signal.SIGKILL)
    return alive


def test_a_step_ends_with_its_run_even_if_that_is_killed():
    assert not step_of_a_killed_run(watched=True, seconds=10)


def test_without_that_it_would_go_on():
    """The forkserver does not end with the run: if this fails, the thread that watches is not needed any more."""
    assert step_of_a_killed_run(watched=False, seconds=2)


SERVER = """
import multiprocessing, os, subprocess, sys, time
from resources.common import processes

if __name__ == "__main__":
    ui = subprocess.Popen(["sleep", "60"])
    os.environ[processes.UI_PROCESS] = str(ui.pid)
    processes.RUN_ENDS_AFTER_UI_SECONDS, processes.SERVER_ENDS_AFTER_UI_SECONDS = 0.5, 60.0
    processes.end_with_run()
    # It watches nothing, as one that is still importing.
    run = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    run.start()
    ui.kill()
    run.join(20)
    print(run.exitcode)
    os._exit(0)
"""


def test_a_run_that_is_only_beginning_ends_with_its_ui_before_the_code_server_does():
    result = subprocess.run(
        [sys.executable, "-c", SERVER], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert result.stdout == "-9\n"


STARTS = """
import subprocess, sys, threading, time
from resources.common.processes import end_if_killed

child = subprocess.Popen([sys.executable, "-c", {child!r}])
is_ending = threading.Event()
if {ending}:
    is_ending.set()
end_if_killed(child.pid, "The daemon", "this ends.", is_ending)
time.sleep({seconds})
sys.exit(7)
"""


@pytest.mark.parametrize(("child", "ending", "code", "says"), [
    ("import os; os.kill(os.getpid(), 9)", False, 1,
     "The daemon was killed (Killed, as the system does when memory runs out), so this ends.\n"),
    ("import os; os.abort()", False, 1, "The daemon was killed (Aborted), so this ends.\n"),
    ("import os; os.kill(os.getpid(), 9)", True, 7, ""),
    ("import os; os.kill(os.getpid(), 15)", False, 7, ""),
    ("exit(3)", False, 7, ""),
    ("import time; time.sleep(4)", False, 7, ""),
])  # fmt: skip
def test_whoever_needs_a_process_ends_when_that_is_killed_and_only_then(child, ending, code, says):
    starts = STARTS.format(child=child, ending=ending, seconds=60 if code == 1 else 2)
    result = subprocess.run(
        [sys.executable, "-c", starts], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1]
    )
    assert (result.returncode, result.stderr) == (code, says)
