"""What a turn of a contender counts, by a clock that only the contenders move."""

from __future__ import annotations

import sys
from itertools import chain, repeat
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import stopwatch


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def contender(self, first: float, later: float):
        """Takes `first` milliseconds where another one ran before it, else `later`."""

        def call() -> None:
            self.seconds += (later if self.last is call else first) * 1e-3
            self.last = call

        return call

    last = None


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setitem(stopwatch.CLOCKS, "wall", clock)
    return clock


@pytest.mark.parametrize("later", [2.0, 0.01])
def test_a_call_is_not_charged_for_what_the_other_contender_left(clock, later):
    contenders = {"ours": clock.contender(7.0, later), "theirs": clock.contender(9.0, 8.0)}
    timings = stopwatch.interleaved(contenders, "cpu", seconds=0, rounds=3)
    assert timings["ours"].median == pytest.approx(later)
    assert timings["theirs"].median == pytest.approx(8.0)
    assert timings["ours"].calls == 3


def test_a_long_call_is_made_once_a_turn(clock):
    times = chain([100.0], repeat(400.0))

    def long() -> None:
        clock.seconds += next(times) * 1e-3

    calls = []
    timings = stopwatch.interleaved({"long": lambda: calls.append(long())}, "cpu", seconds=0, rounds=4)
    assert timings["long"].median == pytest.approx(400.0)
    assert len(calls) == 1 + 4  # one to warm up
