"""What a run says while it trains: sums on the device, a line of JSON, a line for people."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from groupvit_fast.console import UserError, write_text_atomically
from groupvit_fast.training.distributed import sum_over_processes, world_size

TIMINGS = ("images_per_s", "data_wait", "tflops", "mfu", "memory_gb")
"""Entries of metrics.jsonl that differ from run to run."""
PEAK_FLOPS = {"H100": 989.5e12, "H200": 989.5e12, "A100": 312e12}
"""Dense 16-bit operations a second that the maker of a GPU states."""
PLAIN_LINE_SECONDS = 5.0
"""Shortest time between two progress lines where the output is not a terminal."""


def group_statistics(areas: Tensor) -> list[Tensor]:
    """Groups that got patches, how evenly (entropy, 1: all alike, 0: one has all), share of the largest.

    areas [B,G], patches of each group; three 0-dim means over the images. Collapse shows here first.
    """
    shares = areas.float() / areas.sum(dim=1, keepdim=True)
    entropy = torch.special.entr(shares).sum(dim=1) / math.log(max(areas.shape[1], 2))
    in_use = (areas > 0).sum(dim=1).float()
    return [in_use.mean(), entropy.mean(), shares.amax(dim=1).mean()]


def memory_gb(device: str) -> float:
    """Most memory of this process since the last look on a GPU; on a CPU what it holds now."""
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak / 1e9
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def peak_flops(device: str, dtype: str) -> float | None:
    """Operations a second that one device could do: stated for known GPUs, measured by a product on a CPU."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)
    size, best = 768, math.inf
    factors = torch.ones(2, size, size, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    for _ in range(5):
        start = time.perf_counter()
        factors[0] @ factors[1]
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


class RunningMeans:
    """Means of a few numbers over the steps since the last look, kept on the device.

    Steps that were skipped for a number that is not finite do not count, so one of them does not hide the
    rest.
    """

    def __init__(self, names: tuple[str, ...], device: str) -> None:
        self.names = names
        self.sums = torch.zeros(len(names) + 1, device=device)

    def add(self, values: list[Tensor], bad: Tensor) -> None:
        """Add the 0-dim `values` of one step, in the order of the names; nothing is copied to the host."""
        values = torch.stack([*values, torch.ones_like(bad)])
        self.sums += torch.where(bad > 0, torch.zeros_like(values), values)

    def take(self) -> dict[str, float | None]:
        """The means over steps and processes (None: no step counted), after which it starts anew; waits."""
        *sums, count = sum_over_processes(self.sums).tolist()
        self.sums = torch.zeros_like(self.sums)
        return {name: total / count if count else None for name, total in zip(self.names, sums, strict=True)}


class Clock:
    """Seconds spent training and waiting for data since the last look; evaluation and saving do not count."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.start, self.waited, self.images = time.perf_counter(), 0.0, 0

    def next(self, batches: Any) -> Any:
        """The next batch, with the wait for it on record."""
        start = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - start
        self.images += batch.images.shape[0]
        return batch

    def pause(self) -> float:
        """A moment to hand to `proceed`; what happens in between is not counted."""
        return time.perf_counter()

    def proceed(self, paused: float) -> None:
        self.start += time.perf_counter() - paused

    def take(self) -> dict[str, float]:
        """Images a second over all processes and the share of the time spent waiting for data."""
        elapsed = max(time.perf_counter() - self.start, 1e-9)
        rates = {"images_per_s": self.images * world_size() / elapsed, "data_wait": self.waited / elapsed}
        self.restart()
        return rates


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line; nothing is ever half-written but the last line."""

    def __init__(self, path: Path, *, resume_from: int) -> None:
        """Continue the file: lines after step `resume_from`, and a torn last line, are dropped."""
        self.path = path
        kept = [line for line in _lines(path) if _step(line) <= resume_from]
        write_text_atomically(path, "".join(line + "\n" for line in kept))

    def write(self, record: dict[str, Any]) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(_rounded(record)) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; make room and continue with --resume"
            ) from error


class ProgressLine:
    """A bar on a terminal; elsewhere a plain line now and then; nothing at all if quiet."""

    def __init__(self, *, total: int, done: int, quiet: bool) -> None:
        self.total, self.first, self.quiet = total, done, quiet
        self.begun = time.perf_counter()
        self.last_line = -PLAIN_LINE_SECONDS
        terminal = sys.stderr.isatty() and not quiet
        self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True) if terminal else None

    def restart(self, done: int) -> None:
        """Go on from step `done`, which may lie behind."""
        self.first, self.begun = done, time.perf_counter()
        if self.bar is not None:
            self.bar.n = done
            self.bar.refresh()

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def show(self, record: dict[str, Any]) -> None:
        """Show the latest numbers."""
        if self.quiet:
            return
        loss = "-" if record["loss"] is None else f"{record['loss']:.3f}"
        groups = "-" if record["groups_in_use"] is None else f"{record['groups_in_use']:.1f}"
        text = f"{record['images_per_s']:.0f} images/s, loss {loss}, {groups} groups in use"
        if record["bad_steps"]:
            text += f", {record['bad_steps']} steps skipped"
        now = time.perf_counter()
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        elif now - self.last_line >= PLAIN_LINE_SECONDS or record["step"] == self.total:
            self.last_line = now
            print(
                f"step {record['step']}/{self.total}: {text}, {self._left(record['step'])}", file=sys.stderr
            )

    def say(self, line: str) -> None:
        """A line of its own, above the bar."""
        if not self.quiet:
            tqdm.write(line, file=sys.stderr) if self.bar is not None else print(line, file=sys.stderr)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _left(self, step: int) -> str:
        elapsed = time.perf_counter() - self.begun
        seconds = int(elapsed / max(step - self.first, 1) * (self.total - step))
        hours, minutes, seconds = seconds // 3600, seconds // 60 % 60, seconds % 60
        return f"{hours}:{minutes:02d}:{seconds:02d} left" if hours else f"{minutes}:{seconds:02d} left"


def _lines(path: Path) -> list[str]:
    """The whole lines of a metrics file; a last one without its line break was cut off by a crash."""
    if not path.exists():
        return []
    return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _rounded(record: dict[str, Any]) -> dict[str, Any]:
    """Timings need no more than four digits; results keep all of theirs."""
    return {name: float(f"{value:.4g}") if name in TIMINGS else value for name, value in record.items()}
