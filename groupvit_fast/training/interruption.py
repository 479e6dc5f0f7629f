"""Ctrl-C and SIGTERM as a wish that the training loop fulfils after the step in progress."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Interrupted(BaseException):
    """A signal came during work that can be left half-done."""


class Interruption:
    """While active, the first SIGINT or SIGTERM is noted in `signal`; a second one acts at once, as ever."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}
        self._may_leave = False

    def __enter__(self) -> Interruption:
        # Python delivers signals to the main thread only, and lets only it set handlers
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    @contextlib.contextmanager
    def ends(self) -> Iterator[None]:
        """A signal before or in this block leaves it with `Interrupted`: for what is done again later."""
        if self.signal is not None:
            raise Interrupted
        self._may_leave = True
        try:
            yield
        finally:
            self._may_leave = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self.__exit__()
        print("stopping (again: at once)", file=sys.stderr)
        if self._may_leave:
            raise Interrupted
