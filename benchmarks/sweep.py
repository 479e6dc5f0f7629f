"""gumbel_assign over many shapes: the kernel must not be tuned to one of them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import stopwatch
import torch
from cases import assign_case
from tqdm import tqdm

from groupvit_fast.console import write_json

GROUPS = (1, 2, 8, 31, 64)
TOKENS = (1, 7, 64, 196, 785, 3136)
CHANNELS = (32, 100, 384, 768)
WORK = 1 << 24  # multiplications of a case on a CPU: a few milliseconds


def batch_of(groups: int, tokens: int, channels: int, device: str) -> int:
    """A batch that makes every case about as large, between 1 and 256."""
    work = WORK * (64 if device == "cuda" else 1)
    return max(1, min(256, work // (groups * tokens * channels)))


def run(device: str, dtype: torch.dtype, machine: dict[str, object], json: Path | None, clock: str) -> int:
    """Time every shape, print the slowest gains, and return 1 if any is below 1."""
    rows: list[dict[str, Any]] = []
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
            rows.append(
                {
                    "shape": case.shape,
                    "pass": name,
                    "eager_ms": timings["eager"].median,
                    "ours_ms": timings["ours"].median,
                    "speedup": timings["eager"].median / timings["ours"].median,
                }
            )
    head = f"{'shape':<28}{'pass':<18}{'eager ms':>10}{'ours ms':>10}{'x eager':>9}"
    print(f"{head}   the ten smallest gains")
    rows.sort(key=lambda row: row["speedup"])
    for row in rows[:10]:
        times = f"{row['eager_ms']:>10.3f}{row['ours_ms']:>10.3f}{row['speedup']:>9.2f}"
        print(f"{row['shape']:<28}{row['pass']:<18}{times}")
    slower = [row for row in rows if row["speedup"] < 1]
    middle = rows[len(rows) // 2]["speedup"]
    print(f"{len(rows)} timings, median gain {middle:.2f}, {len(slower)} slower than plain PyTorch")
    if json:
        write_json(json, {"machine": machine, "dtype": str(dtype), "rows": rows})
    return 1 if slower else 0
