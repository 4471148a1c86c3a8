"""Processes end with what started them, steps with their run and runs with their UI, and soon after they are told to."""

import _thread
import collections
import contextlib
import ctypes
import itertools
import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeVar

Value = TypeVar("Value")
Result = TypeVar("Result")
PR_SET_PDEATHSIG = 1
GRACE_SECONDS = 8.0
# The process id of `synpo ui`, told to whatever it starts.
UI_PROCESS = "SYNPO_UI_PROCESS"
# The process id of a run, and a file that is there until its home is settled, told to what its steps are forked from.
RUN_PROCESS, CHECKING = "SYNPO_RUN_PROCESS", "SYNPO_CHECKING"
RUN_ENDS_AFTER_UI_SECONDS, SERVER_ENDS_AFTER_UI_SECONDS = 3.0, 9.0
REPEATED_AFTER_SECONDS = 0.1
logger = logging.getLogger("synpo")


def end_with_parent() -> None:
    """Makes this process, if it is a step or of a UI, and all that are forked from here on end when their parents do, even with -9.

    Steps are forked from a forkserver, which need not end with its run; see `end_with_run`.
    """
    os.register_at_fork(after_in_child=end_with_this_parent)
    # By then a forked process knows who asked for it. The registry holds its first argument weakly.
    multiprocessing.util.register_after_fork(end_with_run, lambda end: end())
    end_with_run()


def end_with_this_parent(parent: int | None = None) -> None:
    """Makes this process end when its parent does, even if the parent is killed with -9; on Linux only.

    Args:
        parent: Its process id, where it may have ended before this call: then this process ends here.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def end_with_run() -> None:
    """Makes a step process end within a moment when its run does, even if the run is killed with -9.

    To the kernel, the parent of a step is the forkserver, and that lives on as long as any of its steps does. So a thread
    waits for the end of the process that asked for the step. What `synpo ui` started ends soon after it, too: Dagster's code
    servers, and the runs that they start, would live on for more than a minute.
    """
    run, ui = multiprocessing.parent_process(), _end_of_ui()
    ends = [run.sentinel, *ui] if run else ui
    if not ends:
        return

    def watch() -> None:
        if multiprocessing.connection.wait(ends) == ui:
            # An interrupt may have told both.
            time.sleep(RUN_ENDS_AFTER_UI_SECONDS)
            if not run:
                # A run that is only beginning watches nothing yet.
                for child in multiprocessing.active_children():
                    child.kill()
                # The code server goes last, and reports the runs that were ended.
                time.sleep(SERVER_ENDS_AFTER_UI_SECONDS - RUN_ENDS_AFTER_UI_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="end-with-run", daemon=True).start()


def end_if_killed(process_id: int, what: str, consequence: str, is_ending: threading.Event) -> None:
    """Makes this process end at once, saying so, when a process that it started is killed; on Linux only.

    One that was told to end, by SIGINT or SIGTERM, was not killed; nor was one while this process ends anyway.
    """

    def watch() -> None:
        # Whoever started it still learns how it ended; if it has already, it knows what to do.
        with contextlib.suppress(ChildProcessError):
            ended = os.waitid(os.P_PID, process_id, os.WEXITED | os.WNOWAIT)
            if ended is None or ended.si_code not in (os.CLD_KILLED, os.CLD_DUMPED):
                return
            if ended.si_status not in (signal.SIGINT, signal.SIGTERM) and not is_ending.is_set():
                why = ", as the system does when memory runs out" if ended.si_status == signal.SIGKILL else ""
                logger.error(f"{what} was killed ({signal.strsignal(ended.si_status)}{why}), so {consequence}")
                os._exit(1)

    if sys.platform == "linux":
        threading.Thread(target=watch, name="end-if-killed", daemon=True).start()


def _end_of_ui() -> list[int]:
    """What becomes readable when the `synpo ui` that this process belongs to ends; nothing without one."""
    ui = os.environ.get(UI_PROCESS)
    if ui is None:
        return []
    try:
        return [os.pidfd_open(int(ui))]
    except ProcessLookupError:
        os._exit(1)
    # Not every Python, kernel or container has it.
    except (AttributeError, OSError):
        return []


@contextlib.contextmanager
def ended_after_interrupt(*pauses: float) -> Iterator[None]:
    """Ends this process if the block goes on after its first SIGINT or SIGTERM, which is repeated after each pause but the last.

    An interrupt raises an exception between two Python instructions. A library may swallow that exception, and a long
    call into C or a wait for a process that is dead delays it, while the device stays occupied. Python itself swallows one
    that comes while it removes an object; that interrupt is repeated in a moment.

    Args:
        pauses: Seconds until the next repetition, and in the end until the process is ended with exit code 1.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    ended = threading.Event()

    def watch() -> None:
        while (number := os.read(reader, 1)) and number[0] not in (signal.SIGINT, signal.SIGTERM):
            pass
        for pause in pauses[:-1]:
            if not ended.wait(pause):
                os.kill(os.getpid(), signal.SIGINT)
        if not ended.wait(pauses[-1]):
            logger.error(
                "Process %d did not end within %g s of being told to, and is ended now. Finished work is kept.",
                os.getpid(),
                sum(pauses),
            )
            os._exit(1)

    hook = sys.unraisablehook

    def heard(unraisable: "sys.UnraisableHookArgs") -> None:
        # Whoever raises Dagster's has imported it; to import it here would take every process seconds.
        of_dagster = getattr(sys.modules.get("dagster"), "DagsterExecutionInterruptedError", KeyboardInterrupt)
        if isinstance(unraisable.exc_value, (KeyboardInterrupt, of_dagster)):
            # Not by `threading`, whose locks may be held where an object is removed.
            _thread.start_new_thread(_interrupt_in_a_moment, ())
        else:
            hook(unraisable)

    sys.unraisablehook = heard
    # Python writes the number of each signal there at once, before its handlers get their turn.
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, name="ended-after-interrupt", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        sys.unraisablehook = hook
        signal.set_wakeup_fd(before)
        os.close(writer)
        watcher.join()
        os.close(reader)


def _interrupt_in_a_moment() -> None:
    """Whoever listens by then hears it, also after the block."""
    time.sleep(REPEATED_AFTER_SECONDS)
    os.kill(os.getpid(), signal.SIGINT)


def map_batches(
    function: Callable[[Sequence[Value]], list[Result]], values: Iterable[Value], batch: int, processes: int
) -> Iterator[Result]:
    """What a function makes of batches of a stream, in order; side by side if there is more than one batch.

    Memory holds two batches per process. The function and what it returns must be picklable.
    """
    stream = iter(values)
    batches = iter(lambda: list(itertools.islice(stream, batch)), [])
    first = list(itertools.islice(batches, 2))
    if processes == 1 or len(first) < 2:
        yield from itertools.chain.from_iterable(map(function, itertools.chain(first, batches)))
        return
    spawn, pending = multiprocessing.get_context("spawn"), collections.deque[Future[list[Result]]]()
    with ProcessPoolExecutor(processes, spawn, end_with_this_parent, (os.getpid(),)) as pool:
        for part in itertools.chain(first, batches):
            pending.append(pool.submit(function, part))
            if len(pending) == 2 * processes:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
