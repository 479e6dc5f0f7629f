"""Which kernels take the time of the operators, and what limits the slowest of ours.

    python benchmarks/profiles.py --json FILE --output DIR

PyTorch's profiler times every kernel of one forward and backward per official shape. The slowest of ours then
run once more under Nsight Compute (ncu), where it is installed and may read the counters: DIR gets its table.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from cases import Case, official_cases
from machine import Row, value_row, write_result

from groupvit_fast.console import UserError, resolve_device, run_command, write_text_atomically

SLOWEST = 6
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis")
OURS = re.compile(r"gvit::|groupvit_fast::")
SHOWN = (
    "Duration",
    "DRAM Throughput",
    "Memory Throughput",
    "Compute (SM) Throughput",
    "Registers Per Thread",
    "Achieved Occupancy",
)


def call(case: Case) -> Callable[[], object]:
    """Forward, and backward where there is one, of our operator."""
    own = case.candidates["ours"]
    return case.with_backward(own) if case.leaves else own


def kernel_times(case: Case, device: str) -> dict[str, float]:
    """Microseconds of each kernel (on a CPU: operator) of a call, warm."""
    run = call(case)
    run()
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    times: dict[str, float] = {}
    wanted = torch.profiler.DeviceType.CUDA if device == "cuda" else torch.profiler.DeviceType.CPU
    for event in profiler.events():
        if event.device_type == wanted:
            spent = event.device_time_total if device == "cuda" else event.self_cpu_time_total
            times[event.name] = times.get(event.name, 0.0) + spent
    return times


def measure(device: str, dtype: torch.dtype) -> list[Row]:
    """Rows of all kernels of all official cases, slowest first."""
    rows = []
    for make in official_cases(device, dtype, full=False):
        case = make()
        for kernel, microseconds in kernel_times(case, device).items():
            rows.append(value_row(kernel, f"{case.operator} {case.shape}", "ours", microseconds, "us"))
    return sorted(rows, key=lambda row: -row["value"])


def nsight(kernels: Sequence[str], device: str) -> tuple[str, str]:
    """(CSV of the metrics, why there is none) of the named kernels, from a run of this script under ncu."""
    if shutil.which("ncu") is None:
        return "", "ncu is not installed"
    names = "|".join(sorted({_plain(kernel) for kernel in kernels}))
    command = ["ncu", "--csv", "--kernel-name-base", "function", "--kernel-name", f"regex:^({names})$"]
    command += [word for section in SECTIONS for word in ("--section", section)]
    command += ["--launch-count", str(4 * SLOWEST), sys.executable, __file__, "--device", device, "--calls"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=45)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"ncu: {error}"[:200]
    start = done.stdout.find('"ID"')
    if done.returncode != 0 or start < 0:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("==ERROR==")]
        return "", (said or [f"ncu ended with status {done.returncode}"])[0]
    return done.stdout[start:], ""


def _plain(kernel: str) -> str:
    """The name without return type, namespace, template and call parameters."""
    head = re.split(r"[<(]", kernel.removeprefix("void ").replace("(anonymous namespace)::", ""))[0]
    return re.escape(head.rsplit("::", 1)[-1].strip())


def nsight_rows(table: str) -> list[Row]:
    """The metrics that say what limits a kernel."""
    rows = []
    for line in csv.DictReader(io.StringIO(table)):
        if line.get("Metric Name") in SHOWN:
            text = line["Metric Value"].replace(",", "")
            kernel = f"{_plain(line['Kernel Name'])} #{line['ID']}"
            rows.append(value_row(line["Metric Name"], kernel, "ours", float(text), line["Metric Unit"]))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--output", metavar="DIR", type=Path, help="folder for the table of ncu")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the rows as JSON to FILE")
    parser.add_argument("--calls", action="store_true", help="only call the operators, once a shape")
    arguments = parser.parse_args(argv)
    device = resolve_device(arguments.device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    if arguments.calls:
        for make in official_cases(device, dtype, full=False):
            call(make())()
        return 0
    rows = measure(device, dtype)
    for row in rows[:20]:
        print(f"{row['value']:>10.1f} us  {row['case']:<44}{row['name'][:80]}")
    own = [row["name"] for row in rows if OURS.search(row["name"])][:SLOWEST]
    if not own:
        raise UserError("none of our kernels ran: the operators were not compiled for this device")
    table, why = nsight(own, device)
    if arguments.output and table:
        write_text_atomically(arguments.output / "ncu.csv", table)
    print(f"no counters: {why}" if why else "counters: ncu.csv")
    if arguments.json:
        write_result(
            arguments.json, "profiles", rows[:60] + nsight_rows(table), device=device, ncu=why or "ran"
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
