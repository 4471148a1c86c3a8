"""A step process that does not listen to an interrupt ends all the same."""

import multiprocessing
import os
import signal
import time

from resources import processes


def deaf_step(ready, listens):
    processes.GRACE_SECONDS = 0.5
    processes.end_soon_after_interrupt()
    heard = []
    signal.signal(signal.SIGINT, lambda *_: heard.append(1))
    ready.set()
    while not (listens and heard):
        time.sleep(0.05)


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


def test_the_main_process_is_left_alone():
    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    processes.end_soon_after_interrupt()
    assert signal.set_wakeup_fd(before) == before
