"""Counts of work that do not depend on how busy the machine is, against those that were committed.

    python benchmarks/counts.py             compare; the exit status is 3 where something grew
    python benchmarks/counts.py --update    write benchmarks/counts.json after a change that is meant

instructions  of the CPU kernels, counted by valgrind's callgrind at level avx2 on one thread: those inside
              our library, so that the matrix library of the machine does not matter
traffic       of the CUDA kernels, whose sources run on the host (tests/host_cuda): launches, and the bytes
              that their threads read from and write to tensors
step          of a training step of the tiny recipe on the CPU: operators called, allocations, bytes allocated

Counts of another compiler or another torch are others; such a section is left out, and the output says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import counts_instructions
import counts_step
import counts_traffic
from machine import MISSED, Row, value_row, write_result

from groupvit_fast.console import run_command, write_json

BASELINE = Path(__file__).with_name("counts.json")
TOLERANCE = 0.03
SECTIONS = {
    "instructions": counts_instructions,
    "traffic": counts_traffic,
    "step": counts_step,
}
"""Modules with `conditions()`, what the counts hold for (None: cannot run here), and `measure()`."""
Counts = Mapping[str, int]


def grown(measured: Counts, known: Counts) -> list[str]:
    """One line for each count that is more than the tolerance above the known one, or has none."""
    lines = []
    for name, count in measured.items():
        if name not in known:
            lines.append(f"{name}: {count:,}, and no count was committed for it")
        elif count > known[name] * (1 + TOLERANCE):
            more = count / known[name] - 1 if known[name] else float("inf")
            lines.append(f"{name}: {count:,} instead of {known[name]:,} (+{more:.1%})")
    return lines


def load() -> dict[str, Any]:
    return json.loads(BASELINE.read_text(encoding="utf-8")) if BASELINE.exists() else {}


def obstacle(section: str, known: Mapping[str, Any]) -> str | None:
    """Why a section cannot be compared here, or None."""
    conditions = SECTIONS[section].conditions()
    if isinstance(conditions, str):
        return conditions
    other = known.get(section, {}).get("conditions")
    return None if conditions == other else f"counted with {other}, here is {conditions}"


def compare(section: str, known: Mapping[str, Any]) -> tuple[Counts, list[str]]:
    """(counts of a section, what grew)."""
    measured = SECTIONS[section].measure()
    return measured, grown(measured, known[section]["counts"])


def update(sections: Sequence[str]) -> None:
    """Count anew and write the file; a section that cannot run here keeps what it had."""
    known = load()
    for section in sections:
        conditions = SECTIONS[section].conditions()
        if isinstance(conditions, str):
            print(f"{section}: {conditions}; kept as it was")
            continue
        known[section] = {"conditions": conditions, "counts": SECTIONS[section].measure()}
    write_json(BASELINE, known)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help="commit to the counts of this checkout")
    parser.add_argument("--only", choices=SECTIONS, help="one section")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the rows as JSON to FILE")
    arguments = parser.parse_args(argv)
    sections = [arguments.only] if arguments.only else list(SECTIONS)
    if arguments.update:
        update(sections)
        return 0
    known = load()
    rows: list[Row] = []
    failed = []
    for section in sections:
        why = obstacle(section, known)
        if why:
            print(f"{section}: left out: {why}")
            continue
        measured, larger = compare(section, known)
        failed += larger
        for name, count in measured.items():
            before = known[section]["counts"].get(name, 0)
            print(f"{name:<60}{count:>16,}{count / before - 1 if before else 0:>+9.1%}", flush=True)
            rows.append(value_row(f"{section}: {name}", "counted", "ours", count, "", committed=before))
    if arguments.json:
        write_result(arguments.json, "counts", rows)
    if failed:
        print("more work than was committed to:\n" + "\n".join(failed), flush=True)
        return MISSED
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
