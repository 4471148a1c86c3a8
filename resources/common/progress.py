"""Log lines of long work: count, rate and time left, and a sign of life where nothing can be counted yet."""

import logging
import threading
import time
from collections.abc import Callable
from typing import ClassVar, Self

from resources.common.text import duration

LOG_EVERY_SECONDS = 10
POLL_SECONDS = 1


class Progress:
    """Says how far a piece of work is: at most every ten seconds while things get done, in silence too, and at its end.

    Used with `with`. Where several are under way, one inside another, only the innermost speaks of itself in silence.
    """

    _under_way: ClassVar[list["Progress"]] = []
    _last_said: ClassVar = 0.0

    def __init__(self, total: int | None, what: str, logger: logging.Logger) -> None:
        """Of `total` pieces of work that `what` names in the plural; None: they cannot be counted, `what` names the work."""
        self._total, self._what, self._logger = total, what, logger
        self._done = threading.Event()
        self._own_words: Callable[[], str] | None = None
        self.restart()

    def __enter__(self) -> Self:
        """From now on it speaks in silence too."""
        Progress._under_way.append(self)
        threading.Thread(target=self._watch, name="progress", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Falls silent."""
        self._done.set()
        Progress._under_way.remove(self)

    def restart(self) -> None:
        """Starts the clock anew, when only now the work itself begins."""
        self._started = self._reported = Progress._last_said = time.monotonic()
        self._count = self._tokens = 0

    def add(self, count: int, tokens: int) -> None:
        """Counts what was done since the last call."""
        self._count += count
        self._tokens += tokens
        # A server that is down ends the work before anything is done.
        is_due = time.monotonic() - self._reported >= LOG_EVERY_SECONDS or self._count == self._total
        if self._count and is_due:
            self.report()

    def report(self) -> None:
        """Says how far it is."""
        self._reported = time.monotonic()
        seconds = self._reported - self._started
        if self._own_words is not None:
            tell(self._logger, self._own_words())
        elif self._total is None:
            tell(self._logger, f"{self._what}: {duration(seconds)} so far.")
        elif self._count:
            left = seconds / self._count * (self._total - self._count)
            rate = f"{self._tokens / seconds:.0f} tokens/s"
            tell(self._logger, f"{self._count} of {self._total} {self._what}, {rate}, {duration(left)} left.")
        else:
            tell(self._logger, f"0 of {self._total} {self._what}, {duration(seconds)} so far.")

    def _watch(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            if is_silent() and Progress._under_way[-1:] == [self]:
                self.report()


def say_in_silence(words: Callable[[], str]) -> None:
    """From now on the innermost work under way says this of itself: what only a library's callback sees of it."""
    if Progress._under_way:
        Progress._under_way[-1]._own_words = words


def is_silent() -> bool:
    """Whether nothing was said of any work for ten seconds."""
    return time.monotonic() - Progress._last_said >= LOG_EVERY_SECONDS


def tell(logger: logging.Logger, line: str) -> None:
    """Says a line of work that has a form of its own for it."""
    Progress._last_said = time.monotonic()
    logger.info(line)
