"""Log lines of long work, with count, rate and time left."""

import time
from collections.abc import Callable

LOG_EVERY_SECONDS = 10


class Progress:
    """Says how far a piece of work is, at most every ten seconds and at its end."""

    def __init__(self, total: int, what: str, log: Callable[[str], None]) -> None:
        """Starts the clock.

        Args:
            total: How many there are to do.
            what: What they are, in the plural.
            log: Receives the sentences.
        """
        self._total, self._what, self._log = total, what, log
        self.restart()

    def restart(self) -> None:
        """Starts the clock anew, when only now the work itself begins."""
        self._started = self._reported = time.monotonic()
        self._count = self._tokens = 0

    def add(self, count: int, tokens: int) -> None:
        """Counts what was done since the last call."""
        self._count += count
        self._tokens += tokens
        now = time.monotonic()
        # A server that is down ends the work before anything is done.
        if self._count and (now - self._reported >= LOG_EVERY_SECONDS or self._count == self._total):
            self._reported = now
            seconds = now - self._started
            left = seconds / self._count * (self._total - self._count)
            self._log(
                f"{self._count} of {self._total} {self._what}, {self._tokens / seconds:.0f} tokens/s, {left:.0f} s left."
            )
