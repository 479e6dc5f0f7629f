"""What the machine itself can do: copy bandwidth, and matrix products through PyTorch's own library.

    python benchmarks/ceilings.py --json FILE

Shares and MFU are shares of these, not of a data sheet.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import stopwatch
import torch
from machine import Row, describe, one_line, timing_rows, value_row, write_result

from groupvit_fast.console import resolve_device, run_command

SIDES = {"cpu": 1024, "cuda": 8192}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def measure(device: str, seconds: float) -> list[Row]:
    """Rows: bytes per second of a large copy, FLOP/s of a square product in each type."""
    rows = [value_row("copy", "256 MiB", "torch", stopwatch.copy_bandwidth(device), "B/s")]
    side = SIDES[device]
    products = {}
    for dtype in DTYPES if device == "cuda" else DTYPES[:2]:
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        products[str(dtype).removeprefix("torch.")] = lambda a=left, b=right: a @ b
    timings = stopwatch.interleaved(products, device, seconds=seconds)
    flops = 2 * side**3
    for dtype, timing in timings.items():
        rows += timing_rows(f"product {dtype}", f"{side}^3", {"torch": timing}, flops=flops)
        rows.append(
            value_row(f"rate {dtype}", f"{side}^3", "torch", flops / (timing.median * 1e-3), "FLOP/s")
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for the products (default: 2)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the rows as JSON to FILE")
    arguments = parser.parse_args(argv)
    device = resolve_device(arguments.device)
    torch.manual_seed(0)
    print(one_line(describe(device)))
    rows = measure(device, arguments.seconds)
    for row in rows:
        if "value" in row:
            print(f"{row['name']:<16}{row['case']:<10}{row['value'] / 1e9:>12.1f} G{row['unit']}")
    if arguments.json:
        write_result(arguments.json, "ceilings", rows, device=device)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
