"""Something that others wrote is tried in a process of its own, of which time and memory are bounded; or it is timed alone."""

import contextlib
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator

CPU_SECONDS = 5
WALL_SECONDS = 120
MORE_BYTES = 2**30
TOO_LARGE = 3


class OutOfBoundsError(Exception):
    """It took more than it may; the message says of what, as the end of a sentence."""


@contextlib.contextmanager
def within_time() -> Iterator[None]:
    """Bounds the time of plain Python where a process of its own would cost too much; in the main thread only, as signals do.

    Raises:
        OutOfBoundsError: It takes too long.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise OutOfBoundsError("does not end")

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def within_bounds(is_small: Callable[[], bool]) -> None:
    """Calls a function of plain Python in a fork of this process; whatever it raises is left to whoever calls it for good.

    A fork that is ended from outside, as where the machine's memory ends, says nothing of the function: it is tried again, once.

    Raises:
        OutOfBoundsError: It takes too long or too much memory, or it says that its result is too large.
    """
    status = _tried(is_small)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGXCPU:
        status = _tried(is_small)
    if os.WIFSIGNALED(status):
        ended = os.WTERMSIG(status)
        raise OutOfBoundsError("does not end" if ended == signal.SIGXCPU else f"is ended by signal {ended}")
    if os.WEXITSTATUS(status) == TOO_LARGE:
        raise OutOfBoundsError("grows without end")


def _tried(is_small: Callable[[], bool]) -> int:
    """How the fork ended, as of `os.waitpid`; as if by the limit of its time if it did not."""
    child = os.fork()
    if child == 0:
        _bounded(is_small)
    deadline, ended, status = time.monotonic() + WALL_SECONDS, 0, 0
    while not ended and time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.002)
    if not ended:
        os.kill(child, signal.SIGXCPU)
        _, status = os.waitpid(child, 0)
    return status


def _bounded(is_small: Callable[[], bool]) -> None:
    """What the fork does; it never returns."""
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    try:
        with open("/proc/self/statm") as file:
            held = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MORE_BYTES, held + MORE_BYTES))
    except OSError:
        # Not on Linux.
        pass
    try:
        os._exit(0 if is_small() else TOO_LARGE)
    except MemoryError:
        os._exit(TOO_LARGE)
    except BaseException:
        os._exit(0)
