"""Time the operators against plain PyTorch, after checking that they compute the same.

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
from typing import Any

import stopwatch
import sweep
import torch
from cases import Case, official_cases

from groupvit_fast import ops
from groupvit_fast.console import UserError, resolve_device, run_command, write_json

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PASSES = ("forward", "forward+backward")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--full", action="store_true", help="448 px shapes and torch.compile as well")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the plain code")
    parser.add_argument("--sweep", action="store_true", help="gumbel_assign over many shapes instead")
    parser.add_argument("--only", metavar="NAME", help="only the operators whose name contains NAME")
    parser.add_argument("--seconds", type=float, default=1.0, help="time per row (default: 1)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--clock", choices=stopwatch.CLOCKS, default="wall", help="cpu: of this process alone"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the rows as JSON to FILE")
    parser.add_argument(
        "--plot", metavar="FILE", type=Path, help="bar chart of the speed-ups (needs matplotlib)"
    )
    return parser.parse_args(argv)


def measure(
    case: Case, device: str, bandwidth: float, *, compiled: bool, seconds: float, clock: str
) -> list[dict[str, Any]]:
    """Check, then time: one row per pass."""
    case.check()
    forward = dict(case.candidates)
    if compiled and case.compilable is not None:
        forward = {"eager": forward.pop("eager"), "compile": torch.compile(case.compilable), **forward}
    rows = []
    for name in PASSES if case.leaves else PASSES[:1]:
        both = name != "forward"
        candidates = {k: case.with_backward(c) if both else c for k, c in forward.items()}
        timings = stopwatch.interleaved(candidates, device, seconds=seconds, clock=clock)
        moved = case.forward_bytes() + (case.backward_bytes() if both else 0)
        own = timings["ours"].median
        rows.append(
            {
                "operator": case.operator,
                "shape": case.shape,
                "pass": name,
                "ms": {k: vars(t) for k, t in timings.items()},
                "speedup": {k: t.median / own for k, t in timings.items() if k != "ours"},
                "bytes": moved,
                "floor_ms": moved / bandwidth * 1e3,
                "percent_of_copy": 100 * moved / bandwidth / (own * 1e-3),
                "peak_bytes": {k: stopwatch.peak_memory(candidates[k], device) for k in ("eager", "ours")},
            }
        )
    return rows


HEADER = (
    f"{'operator':<16}{'shape':<24}{'pass':<9}{'eager ms':>10}{'best other':>17}{'ours ms':>10}"
    f"{'p10-p90':>16}{'x eager':>9}{'x other':>9}{'% copy':>8}{'peak MB: eager, ours':>22}"
)


def line(row: dict[str, Any]) -> str:
    """One aligned line of the table."""
    ms, own = row["ms"], row["ms"]["ours"]
    others = {name: t["median"] for name, t in ms.items() if name not in ("eager", "ours")}
    best = min(others, key=others.get) if others else None
    other = f"{others[best]:.3f} {best:<7}" if best else "-"
    gain = f"{row['speedup'][best]:.2f}" if best else "-"
    peaks = [row["peak_bytes"][name] / 2**20 for name in ("eager", "ours")]
    spread = f"{own['low']:.3f}-{own['high']:.3f}"
    short = "fwd" if row["pass"] == "forward" else "fwd+bwd"
    return (
        f"{row['operator']:<16}{row['shape']:<24}{short:<9}{ms['eager']['median']:>10.3f}{other:>17}"
        f"{own['median']:>10.3f}{spread:>16}{row['speedup']['eager']:>9.2f}{gain:>9}"
        f"{row['percent_of_copy']:>8.1f}{peaks[0]:>13.2f}{peaks[1]:>9.2f}"
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars: how many times faster than plain PyTorch."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    labels = [f"{row['operator']} {row['shape']}\n{row['pass']}" for row in rows]
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(rows) + 1), layout="constrained")
    bars = axes.barh(labels, [row["speedup"]["eager"] for row in rows])
    axes.bar_label(bars, fmt="%.1f x", padding=3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="times faster than plain PyTorch")
    axes.invert_yaxis()
    figure.savefig(path, dpi=150)
    plt.close(figure)


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
    machine = stopwatch.describe_machine(device)
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    if arguments.sweep:
        return sweep.run(device, dtype, machine, arguments.json, arguments.clock)
    bandwidth = stopwatch.copy_bandwidth(device)
    bandwidth_text = f"copy bandwidth {bandwidth / 1e9:.1f} GB/s"
    print(f"{bandwidth_text}; {dtype}; medians of interleaved calls, {arguments.clock} clock")
    print(HEADER)
    rows = []
    compiled = arguments.compile or arguments.full or device == "cuda"
    for make in official_cases(device, dtype, full=arguments.full or device == "cuda"):
        case = make()
        if arguments.only and arguments.only not in case.operator:
            continue
        settings = {"compiled": compiled, "seconds": arguments.seconds, "clock": arguments.clock}
        for row in measure(case, device, bandwidth, **settings):
            print(line(row), flush=True)
            rows.append(row)
    if arguments.json:
        result = {"machine": machine, "dtype": str(dtype), "clock": arguments.clock}
        result |= {"copy_bytes_per_s": bandwidth, "rows": rows}
        write_json(arguments.json, result)
    if arguments.plot:
        plot(rows, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
