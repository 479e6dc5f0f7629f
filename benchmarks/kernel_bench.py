"""Time the operators, and the blocks they are in, against plain PyTorch, after checking that both agree.

    python benchmarks/kernel_bench.py            official shapes at 224 px, a minute on two cores
    python benchmarks/kernel_bench.py --full     448 px as well, and torch.compile of the plain code
    python benchmarks/kernel_bench.py --sweep    is any shape slower than plain PyTorch?

All candidates of a row run in turn in one process. A row whose check fails is an error, not a number.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import plots
import stopwatch
import sweep
import torch
from block_cases import official_blocks
from cases import Case, official_cases
from machine import Row, describe, one_line, timing_rows, write_result

from groupvit_fast import ops
from groupvit_fast.console import UserError, resolve_device, run_command

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PASSES = ("forward", "forward+backward")
COUNTED = ("eager", "ours")  # contenders whose memory and waiting are counted too


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--full", action="store_true", help="448 px shapes and torch.compile as well")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the plain code")
    parser.add_argument("--sweep", action="store_true", help="two operators over many shapes instead")
    parser.add_argument("--only", metavar="NAME", help="only the operators whose name contains NAME")
    parser.add_argument("--seconds", type=float, default=1.0, help="time per row (default: 1)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--clock", choices=stopwatch.CLOCKS, default="wall", help="cpu: of this process alone"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the rows as JSON to FILE")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="also draw the speed-ups as an SVG")
    return parser.parse_args(argv)


def measure(
    case: Case, device: str, bandwidth: float, *, compiled: bool, seconds: float, clock: str
) -> list[list[Row]]:
    """Check, then time: for each pass the rows of its contenders."""
    case.check()
    forward = dict(case.candidates)
    if compiled and case.compilable is not None:
        forward = {"eager": forward.pop("eager"), "compile": torch.compile(case.compilable), **forward}
    passes = []
    for name in PASSES if case.leaves else PASSES[:1]:
        both = name != "forward"
        candidates = {k: case.with_backward(c) if both else c for k, c in forward.items()}
        timings = stopwatch.interleaved(candidates, device, seconds=seconds, clock=clock)
        moved = case.forward_bytes() + (case.backward_bytes() if both else 0)
        floor = moved / bandwidth
        passes.append(
            timing_rows(
                f"{case.operator} {name}",
                case.shape,
                timings,
                bytes=moved,
                floor_s=floor,
                percent_of_copy={k: 100 * floor / (t.median * 1e-3) for k, t in timings.items()},
                peak_bytes={k: stopwatch.peak_memory(candidates[k], device) for k in COUNTED},
                host_reads={k: stopwatch.host_reads(candidates[k]) for k in COUNTED},
                saved_bytes={k: stopwatch.saved_bytes(forward[k], case.leaves) for k in COUNTED if both},
            )
        )
    return passes


HEADER = (
    f"{'operator':<16}{'shape':<24}{'pass':<9}{'eager ms':>10}{'best other':>20}{'ours ms':>10}"
    f"{'p10-p90':>16}{'x eager':>9}{'x other':>9}{'% copy':>8}{'peak MB: eager, ours':>22}"
)


def line(rows: list[Row]) -> str:
    """One aligned line of the table from the contenders of a case."""
    found = {row["contender"]: row for row in rows}
    eager, own = found.pop("eager"), found.pop("ours")
    best = min(found.values(), key=lambda row: row["median_s"], default=None)
    other = f"{best['median_s'] * 1e3:.3f} {best['contender']:<10}" if best else "-"
    gain = f"{best['ratio']:.2f}" if best else "-"
    peaks = [row["peak_bytes"] / 2**20 for row in (eager, own)]
    spread = f"{own['p10_s'] * 1e3:.3f}-{own['p90_s'] * 1e3:.3f}"
    operator, _, direction = own["name"].partition(" ")
    short = "fwd" if direction == "forward" else "fwd+bwd"
    return (
        f"{operator:<16}{own['case']:<24}{short:<9}{eager['median_s'] * 1e3:>10.3f}{other:>20}"
        f"{own['median_s'] * 1e3:>10.3f}{spread:>16}{eager['ratio']:>9.2f}{gain:>9}"
        f"{own['percent_of_copy']:>8.1f}{peaks[0]:>13.2f}{peaks[1]:>9.2f}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    device = resolve_device(arguments.device)
    dtype = DTYPES[arguments.dtype or ("bf16" if device == "cuda" else "fp32")]
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if ops.backend() == "reference":
        raise UserError(
            "no compiled operators here, so there is nothing to compare; build with pip install -e ."
        )
    torch.manual_seed(0)
    print(one_line(describe(device)))
    if arguments.sweep:
        return sweep.run(device, dtype, arguments.only, arguments.json, arguments.clock)
    bandwidth = stopwatch.copy_bandwidth(device, arguments.clock)
    bandwidth_text = f"copy bandwidth {bandwidth / 1e9:.1f} GB/s"
    print(f"{bandwidth_text}; {dtype}; medians of interleaved calls, {arguments.clock} clock")
    print(HEADER)
    rows: list[Row] = []
    about = {"dtype": str(dtype), "clock": arguments.clock, "copy_bytes_per_s": bandwidth}
    compiled = arguments.compile or arguments.full or device == "cuda"
    settings = {"compiled": compiled, "seconds": arguments.seconds, "clock": arguments.clock}
    full = arguments.full or device == "cuda"
    for make in (*official_cases(device, dtype, full=full), *official_blocks(device, dtype)):
        case = make()
        if arguments.only and arguments.only not in case.operator:
            continue
        for contenders in measure(case, device, bandwidth, **settings):
            print(line(contenders), flush=True)
            rows += contenders
        if arguments.json:
            write_result(arguments.json, "kernel_bench", rows, device=device, **about)
    if arguments.plot:
        plots.draw(rows, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
