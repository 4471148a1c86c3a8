"""Step processes end with the run that started them, and soon after they are told to."""

import collections
import ctypes
import functools
import itertools
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


def end_with_parent() -> None:
    """Makes this process, if it is a step, and all that are forked from here on end when their parents do, even with -9.

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
    waits for the end of the process that asked for the step.
    """
    run = multiprocessing.parent_process()
    if run is None:
        return

    def watch() -> None:
        multiprocessing.connection.wait([run.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="end-with-run", daemon=True).start()


@functools.cache
def end_soon_after_interrupt() -> None:
    """Makes a step process end within two grace periods of its first interrupt, whatever it is doing.

    An interrupt raises an exception between two Python instructions. A library may swallow that exception, and a long
    call into C delays it, while the device stays occupied. So the interrupt is repeated once, and then the process ends.
    Only child processes are treated so: the main process of a command is the user's to stop.
    """
    if multiprocessing.parent_process() is None or threading.current_thread() is not threading.main_thread():
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # Python writes the number of each signal here at once, before its handlers get their turn.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while os.read(reader, 1)[0] != signal.SIGINT:
            pass
        time.sleep(GRACE_SECONDS)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(GRACE_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="end-soon-after-interrupt", daemon=True).start()


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
