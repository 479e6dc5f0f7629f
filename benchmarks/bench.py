"""Run every benchmark and write one folder: JSON of each part, a Markdown report, plots, logs.

    python benchmarks/bench.py                 build/bench; under 15 minutes on two cores (`make bench`)
    python benchmarks/bench.py --keep          benchmarks/results/<this machine>
    python benchmarks/bench.py --only kernels  one part; the others keep what they wrote before

Each part is a process of its own with a time limit. One that fails, lacks a package or runs out of time
says so in the report, and the rest goes on; "missed" is one that ran and whose numbers are not good enough.
The report is written again after every part.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import machine
import report

from groupvit_fast.console import UserError, resolve_device, run_command, write_bytes_atomically, write_json

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PYTHON = sys.executable
LEAST = 5.0  # seconds that a part can do anything in
PLACES = ("{json}", "{output}", "{device}")  # of a part's command, filled in when it runs


@dataclass(frozen=True)
class Part:
    """A command with a time limit in seconds."""

    name: str
    seconds: int
    command: tuple[str, ...]
    needs: str = ""  # a program that must be on the path

    @property
    def script(self) -> Path | None:
        """The file of ours that the command runs."""
        return next((ROOT / word for word in self.command if word.endswith(".py")), None)


def _bench(name: str, seconds: int, *arguments: str, script: str = "") -> Part:
    path = f"benchmarks/{script or name}.py"
    return Part(name, seconds, (PYTHON, path, "--device", "{device}", "--json", "{json}", *arguments))


_LOADER = ("--data", "--only-ours", "--seconds", "8", "--rounds", "3")
CPU_PARTS = (
    _bench("ceilings", 20),
    _bench("kernel_bench", 200, "--full"),
    _bench("train_bench", 110, "--seconds", "10", "--rounds", "3"),
    _bench(
        "train_bench_bf16", 40, "--precision", "bf16", "--seconds", "8", "--rounds", "3", script="train_bench"
    ),
    _bench("train_bench_loader", 60, *_LOADER, script="train_bench"),
    _bench("eval_bench", 130, "--images", "24", "--part", "12", "--seconds", "1"),
    _bench("data_bench", 120, "--seconds", "4"),
    _bench("scaling", 110),
    Part("counts", 50, (PYTHON, "benchmarks/counts.py", "--json", "{json}")),
    # What is left of the time; alone with --only kernel_sweep where that is too little.
    _bench("kernel_sweep", 600, "--sweep", "--clock", "cpu", "--threads", "1", script="kernel_bench"),
)
_TESTS = (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider")
_TESTS += ("-n", "8") if find_spec("xdist") else ()
GPU_PARTS = (
    _bench("ceilings", 40),
    _bench("kernel_bench", 150, "--seconds", "0.4"),
    Part("operator_tests", 120, (*_TESTS, "tests/ops", "-k", "cuda and not host_cuda")),
    _bench("train_bench", 90, "--compile", "--seconds", "10"),
    _bench("train_bench_large", 60, "--compile", "--only-ours", "--batch-size", "1024", script="train_bench"),
    _bench("train_bench_loader", 45, *_LOADER, script="train_bench"),
    _bench("eval_bench", 60),
    _bench("data_bench", 45),
    *(
        Part(
            f"sanitizer_{tool}",
            45,
            (PYTHON, "tests/sanitize.py", "--tool", tool, "--calls", "40"),
            needs="compute-sanitizer",
        )
        for tool in ("memcheck", "racecheck", "synccheck", "initcheck")
    ),
    Part("profiles", 60, (PYTHON, "benchmarks/profiles.py", "--json", "{json}", "--output", "{output}")),
    _bench("scaling", 60),
)


def run_part(part: Part, output: Path, device: str, limit: float) -> dict[str, object]:
    """Run one part; returns its record: status, seconds, why."""
    if part.needs and shutil.which(part.needs) is None:
        return {"status": "left out", "seconds": 0.0, "why": f"{part.needs} is not installed"}
    if part.script and not part.script.exists():
        return {"status": "left out", "seconds": 0.0, "why": f"{part.script.name} is not in this checkout"}
    if limit < LEAST:
        return {"status": "left out", "seconds": 0.0, "why": "no time was left"}
    result = output / f"{part.name}.json"
    log = output / "logs" / f"{part.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    result.unlink(missing_ok=True)  # a number of an earlier run must not pass for one of this
    filled = {"{json}": str(result), "{output}": str(output), "{device}": device}
    command = [filled.get(word, word) for word in part.command]
    start = time.monotonic()
    with open(log, "wb") as file:
        status = _run(command, file, limit)
    seconds = round(time.monotonic() - start, 1)
    if status is None:
        return {"status": "cut off", "seconds": seconds, "why": f"longer than {limit:.3g} s"}
    if status == machine.MISSED:
        return {"status": "missed", "seconds": seconds, "why": f"ran to its end: {last_line(log)}"}
    if status != 0:
        return {"status": "failed", "seconds": seconds, "why": f"status {status}: {last_words(log)}"}
    said = "" if "{json}" in part.command else last_line(log)  # how many tests passed
    return {"status": "done", "seconds": seconds, "why": said}


def _run(command: Sequence[str], log, limit: float) -> int | None:
    """The exit status, None when it ran into the limit; its whole process group ends then."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as error:
        log.write(f"{command[0]}: {error.strerror}\n".encode())
        return 127
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _lines(log: Path) -> list[str]:
    return [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]


def last_line(log: Path) -> str:
    """What a part said in the end."""
    return (_lines(log) or [""])[-1][:200]


def last_words(log: Path) -> str:
    """The line of a log that says what went wrong: the last error, else the last line."""
    errors = [line for line in _lines(log) if "error" in line.lower()]
    return errors[-1][:200] if errors else last_line(log) or "it said nothing"


def run_all(
    parts: Sequence[Part], output: Path, device: str, minutes: float, pack: Path | None = None
) -> int:
    """Run the parts one after another, rendering after each; the number of those that did not finish."""
    output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    records = report.read_parts(output)
    bad = 0
    for part in parts:
        print(f"{part.name:<22}", end="", flush=True)
        record = run_part(part, output, device, min(part.seconds, end - time.monotonic()))
        print(f"{record['seconds']:>7.1f} s  {record['status']:<9} {record['why']}", flush=True)
        bad += record["status"] not in ("done", "missed")
        records[part.name] = record
        write_json(output / "parts.json", records)
        _render(output, pack)
    return bad


def _render(output: Path, pack: Path | None) -> None:
    """A report that cannot be rendered must not cost the measurements."""
    try:
        report.render(output)
    except Exception as error:
        print(f"report: {type(error).__name__}: {error}", file=sys.stderr)
    if pack:
        pack.mkdir(parents=True, exist_ok=True)
        made = shutil.make_archive(str(output.parent / "results"), "gztar", output.parent, output.name)
        for path in (Path(made), output / "report.md"):
            write_bytes_atomically(pack / path.name, path.read_bytes())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--output", metavar="DIR", type=Path, help="default: build/bench")
    parser.add_argument("--keep", action="store_true", help="write to benchmarks/results/<this machine>")
    parser.add_argument("--only", metavar="PARTS", help="names of parts, with commas between")
    parser.add_argument("--pack", metavar="DIR", type=Path, help="also report.md and an archive there")
    parser.add_argument("--minutes", type=float, default=15, help="time limit of everything (default: 15)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    device = resolve_device(arguments.device)
    parts = GPU_PARTS if device == "cuda" else CPU_PARTS
    if arguments.only:
        wanted = arguments.only.split(",")
        unknown = set(wanted) - {part.name for part in parts}
        if unknown:
            known = ", ".join(part.name for part in parts)
            raise UserError(f"--only: no part {', '.join(sorted(unknown))}; there are {known}")
        parts = tuple(part for part in parts if part.name in wanted)
    kept = HERE / "results" / machine.slug(device) if arguments.keep else ROOT / "build" / "bench"
    output = (arguments.output or kept).resolve()
    bad = run_all(parts, output, device, arguments.minutes, arguments.pack)
    print(report.summary(output))
    print(
        f"report: {output / 'report.md'}" + (f"; {bad} of {len(parts)} parts did not finish" if bad else "")
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
