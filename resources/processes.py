"""Step processes end with the run that started them."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Makes every process forked from here on end when its parent does, even if the parent is killed with -9.

    Without it, a step of a killed run would go on computing, and the next run would do the same work beside it.
    Linux only (prctl(2)); elsewhere nothing happens.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        os.register_at_fork(after_in_child=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL))
