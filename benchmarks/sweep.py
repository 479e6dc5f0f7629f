"""gumbel_assign and group_attention over many shapes: the kernels must not be tuned to one of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import stopwatch
import torch
from cases import Case, assign_case, attention_case
from machine import MISSED, Row, timing_rows, write_result
from tqdm import tqdm

GROUPS = (1, 2, 8, 31, 64)
TOKENS = (1, 7, 64, 196, 785, 3136)
CHANNELS = (32, 100, 384, 768)
WORK = 1 << 24  # multiplications of a case on a CPU: a few milliseconds


def batch_of(groups: int, tokens: int, channels: int, device: str) -> int:
    """A batch that makes every case about as large, between 1 and 256."""
    work = WORK * (64 if device == "cuda" else 1)
    return max(1, min(256, work // (groups * tokens * channels)))


def makers(device: str, dtype: torch.dtype, only: str | None) -> list[Callable[[], Case]]:
    """Both operators at every shape, made one at a time; heads of about 64 channels."""
    found: list[Callable[[], Case]] = []
    for groups, tokens, channels in itertools.product(GROUPS, TOKENS, CHANNELS):
        batch, heads = batch_of(groups, tokens, channels, device), max(1, round(channels / 64))
        assign, attention = (
            (batch, groups, tokens, channels),
            (batch, heads, groups, tokens, channels // heads),
        )
        if only is None or only in "gumbel_assign":
            found.append(lambda s=assign: assign_case(*s, device, dtype))
        if only is None or only in "group_attention":
            found.append(lambda s=attention: attention_case(*s, device, dtype))
    return found


def rows_of(case: Case, device: str, clock: str) -> Iterator[Row]:
    """Check one case and time both passes; a loss is measured again, longer, before it is believed."""
    case.check()
    for name in ("forward", "forward+backward"):
        both = name != "forward"
        candidates = {k: case.with_backward(c) if both else c for k, c in case.candidates.items()}
        for seconds, rounds in ((0.0, 5), (0.3, 15)):
            timings = stopwatch.interleaved(candidates, device, seconds=seconds, rounds=rounds, clock=clock)
            if timings["ours"].median <= min(timing.median for timing in timings.values()):
                break
        yield from timing_rows(f"{case.operator} {name}", case.shape, timings)


def summary(operator: str, rows: list[Row]) -> list[str]:
    """The smallest gains of an operator over plain PyTorch, the middle one, and how many are below 1."""
    gains = sorted((row for row in rows if row["contender"] == "eager"), key=lambda row: row["ratio"])
    text = [
        f"{operator:<28}{'pass':<18}{'eager ms':>10}{'ours ms':>10}{'x eager':>9}   the ten smallest gains"
    ]
    for row in gains[:10]:
        eager, gain = row["median_s"] * 1e3, row["ratio"]
        direction = row["name"].partition(" ")[2]
        text.append(f"{row['case']:<28}{direction:<18}{eager:>10.3f}{eager / gain:>10.3f}{gain:>9.2f}")
    slower = sum(row["ratio"] < 1 for row in gains)
    middle = gains[len(gains) // 2]["ratio"]
    text.append(f"{len(gains)} timings, median gain {middle:.2f}, {slower} slower than plain PyTorch")
    stock: dict[tuple[str, str], float] = {}
    for row in rows:
        if row["contender"].startswith("SDPA"):
            key = (row["name"], row["case"])
            stock[key] = min(stock.get(key, row["ratio"]), row["ratio"])
    if stock:
        text.append(f"{sum(ratio < 1 for ratio in stock.values())} slower than the best SDPA back end")
    return text


def run(device: str, dtype: torch.dtype, only: str | None, json: Path | None, clock: str) -> int:
    """Time every shape, print the slowest gains, and return `MISSED` if any is below 1.

    On a CPU the memory that a call releases is kept for the next: whether a result meets fresh pages depends
    on what else lies on the heap, and took eager code from 9 to 29 ms at one shape, in one process.
    """
    if device == "cpu":
        stopwatch.keep_released_memory()
    rows: list[Row] = []
    for make in tqdm(makers(device, dtype, only), unit="shape", disable=None):
        rows += rows_of(make(), device, clock)
    for operator in dict.fromkeys(row["name"].partition(" ")[0] for row in rows):
        print("\n".join(summary(operator, [row for row in rows if row["name"].startswith(operator)])))
    if json:
        write_result(json, "kernel_sweep", rows, device=device, dtype=str(dtype), clock=clock)
    lost = any(row["contender"] == "eager" and row["ratio"] < 1 for row in rows)
    return MISSED if lost else 0
