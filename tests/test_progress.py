"""What long work says of itself, by a clock that is set."""

import logging
import threading

import pytest

from resources.common import progress
from resources.common.progress import Progress, say_in_silence, tell
from resources.common.text import duration

LOGGER = logging.getLogger("synpo.test")


class Clock:
    """Time stands still until it is moved."""

    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    # Looks at the clock as often as it can.
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.001)
    return clock


def waits_for(said, count):
    """Whether so many lines are said soon."""
    pause = threading.Event()
    for _ in range(300):
        if len(said) >= count:
            return True
        pause.wait(0.001)
    return False


def test_lines_come_every_ten_seconds_and_at_the_end(clock, said):
    with Progress(4, "rows", LOGGER) as rows:
        for seconds in (5, 5, 200, 1):
            rows.add(1, 100)
            clock.now += seconds
            assert len(said) <= 4
    assert said[-1] == "4 of 4 rows, 2 tokens/s, 0 s left."
    assert "3 of 4 rows, 30 tokens/s, 3.3 s left." in said


def test_the_first_batch_is_not_silent(clock, said):
    with Progress(48, "completions", LOGGER):
        for number in range(1, 4):
            clock.now += 10
            assert waits_for(said, number)
    assert said == [f"0 of 48 completions, {10 * number} s so far." for number in range(1, 4)]


def test_only_the_innermost_work_speaks_in_silence(clock, said):
    with Progress(None, "At work", LOGGER), Progress(9, "rows", LOGGER) as rows:
        rows.add(3, 30)
        clock.now += 12
        assert waits_for(said, 1)
    with Progress(None, "At work", LOGGER):
        clock.now += 150
        assert waits_for(said, 2)
    assert said == ["3 of 9 rows, 2 tokens/s, 24 s left.", "At work: 2.5 min so far."]


def test_another_line_of_the_work_is_a_sign_of_life(clock, said):
    with Progress(None, "Training", LOGGER):
        clock.now += 9
        tell(LOGGER, "Step 1 of 2.")
        clock.now += 9
        assert not waits_for(said, 2)
        clock.now += 1
        assert waits_for(said, 2)
    assert said == ["Step 1 of 2.", f"Training: {duration(19)} so far."]
    clock.now += 100
    assert not waits_for(said, 3), "it goes on after its end"


def test_what_only_a_callback_sees_is_said_in_silence(clock, said):
    with Progress(None, "Training", LOGGER):
        clock.now += 10
        assert waits_for(said, 1)
        say_in_silence(lambda: f"Step 1 of 2, {1040 - clock.now:.0f} s left.")
        for count in (2, 3):
            clock.now += 10
            assert waits_for(said, count)
    assert said == ["Training: 10 s so far.", "Step 1 of 2, 20 s left.", "Step 1 of 2, 10 s left."]
    say_in_silence(str)
