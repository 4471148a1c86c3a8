"""Log lines of long work, with count, rate and time left."""

import logging
import time

LOG_EVERY_SECONDS = 10


class Progress:
    """Says how far a piece of work is, at most every ten seconds and at its end."""

    def __init__(self, total: int, what: str, logger: logging.Logger) -> None:
        """Starts the clock of `total` pieces of work; `what` names them in the plural."""
        self._total, self._what, self._logger = total, what, logger
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
            self._logger.info(
                f"{self._count} of {self._total} {self._what}, {self._tokens / seconds:.0f} tokens/s, {left:.0f} s left."
            )
