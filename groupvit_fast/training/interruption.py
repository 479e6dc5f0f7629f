"""Ctrl-C and SIGTERM as a wish that the training loop fulfils after the step in progress."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any


class Interruption:
    """While active, the first SIGINT or SIGTERM is noted in `signal`; a second one acts at once, as ever."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        # Python delivers signals to the main thread only, and lets only it set handlers
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self.__exit__()
        print("stopping after this step (again: at once)", file=sys.stderr)
