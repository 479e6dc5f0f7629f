"""gumbel_assign over many shapes: the kernel must not be tuned to one of them."""

from __future__ import annotations

import itertools
from pathlib import Path

import stopwatch
import torch
from cases import assign_case
from machine import Row, timing_rows, write_result
from tqdm import tqdm

GROUPS = (1, 2, 8, 31, 64)
TOKENS = (1, 7, 64, 196, 785, 3136)
CHANNELS = (32, 100, 384, 768)
WORK = 1 << 24  # multiplications of a case on a CPU: a few milliseconds


def batch_of(groups: int, tokens: int, channels: int, device: str) -> int:
    """A batch that makes every case about as large, between 1 and 256."""
    work = WORK * (64 if device == "cuda" else 1)
    return max(1, min(256, work // (groups * tokens * channels)))


def run(device: str, dtype: torch.dtype, json: Path | None, clock: str) -> int:
    """Time every shape, print the slowest gains, and return 1 if any is below 1."""
    rows: list[Row] = []
    shapes = list(itertools.product(GROUPS, TOKENS, CHANNELS))
    for groups, tokens, channels in tqdm(shapes, unit="shape", disable=None):
        case = assign_case(
            batch_of(groups, tokens, channels, device), groups, tokens, channels, device, dtype
        )
        case.check()
        for name in ("forward", "forward+backward"):
            both = name != "forward"
            candidates = {k: case.with_backward(c) if both else c for k, c in case.candidates.items()}
            timings = stopwatch.interleaved(candidates, device, seconds=0.0, rounds=5, clock=clock)
            rows += timing_rows(f"{case.operator} {name}", case.shape, timings)
    gains = sorted((row for row in rows if row["contender"] == "eager"), key=lambda row: row["ratio"])
    print(f"{'shape':<28}{'pass':<18}{'eager ms':>10}{'ours ms':>10}{'x eager':>9}   the ten smallest gains")
    for row in gains[:10]:
        eager, gain = row["median_s"] * 1e3, row["ratio"]
        direction = row["name"].partition(" ")[2]
        print(f"{row['case']:<28}{direction:<18}{eager:>10.3f}{eager / gain:>10.3f}{gain:>9.2f}")
    slower = sum(row["ratio"] < 1 for row in gains)
    middle = gains[len(gains) // 2]["ratio"]
    print(f"{len(gains)} timings, median gain {middle:.2f}, {slower} slower than plain PyTorch")
    if json:
        write_result(json, "kernel_sweep", rows, device=device, dtype=str(dtype), clock=clock)
    return 1 if slower else 0
