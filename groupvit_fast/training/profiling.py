"""A trace of a few steps, asked for with --profile-steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch

from groupvit_fast.console import UserError, write_text_atomically


def step_range(text: str) -> tuple[int, int]:
    """`"10:13"` -> (10, 13): steps 10, 11 and 12, counted from 0."""
    first, colon, end = text.partition(":")
    if not (colon and first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise UserError(f"--profile-steps {text}: expected FIRST:END, such as 10:13 for steps 10, 11 and 12")
    return int(first), int(end)


class StepProfiler:
    """Profiles the steps of `steps`; writes `folder`/trace_rank_R.json (for chrome://tracing or Perfetto) and
    a table of operators. On a GPU each of these steps is an NVTX range too, for Nsight Systems."""

    def __init__(self, steps: str | None, folder: Path, rank: int, say: Callable[[str], None]) -> None:
        self.first, self.end = step_range(steps) if steps else (-1, -1)
        self.folder, self.rank, self.say = folder, rank, say
        self._profile: torch.profiler.profile | None = None

    def step(self, number: int) -> contextlib.AbstractContextManager:
        """What step `number` runs in."""
        if not self.first <= number < self.end:
            return contextlib.nullcontext()
        if self._profile is None:
            self._profile = torch.profiler.profile(profile_memory=True)
            self._profile.start()
        return self._ranged(number)

    def close(self) -> None:
        """End the trace, if one runs, and write it."""
        profile, self._profile = self._profile, None
        if profile is None:
            return
        profile.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / f"trace_rank_{self.rank}.json"
        profile.export_chrome_trace(str(trace))
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profile.key_averages().table(sort_by=order, row_limit=40)
        write_text_atomically(self.folder / f"operators_rank_{self.rank}.txt", table + "\n")
        self.say(f"profile of steps {self.first} to {self.end - 1}: {trace}")

    @contextlib.contextmanager
    def _ranged(self, number: int):
        nvtx = torch.cuda.nvtx.range if torch.cuda.is_available() else lambda name: contextlib.nullcontext()
        with nvtx(f"step {number}"), torch.profiler.record_function(f"step {number}"):
            yield
        if number == self.end - 1:
            self.close()
