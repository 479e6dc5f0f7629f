"""Compare the results in a folder with goals.yaml: goal, measured, met or missed, why."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("goals.yaml")
LEVELS = ("must", "target", "moonshot")
RECIPE_PAIRS = 30 * 28.7e6  # epochs of CC3M, CC12M and YFCC14M together
COMPARED = {"memory": "peak_bytes", "saved": "saved_bytes"}
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Goal:
    """One line of goals.yaml, under its device and bench."""

    device: str
    bench: str
    key: str
    what: str
    name: str
    case: str = ".*"
    contender: str = "eager"
    measure: str = "ratio"
    unit: str = "{:.2f} x"
    less: bool = False  # less is better
    best: bool = False  # the best row counts, not the worst: one of several settings suffices
    must: float | None = None
    target: float | None = None
    moonshot: float | None = None
    absent: str = ""  # why no bench can measure it here

    def reached(self, value: float) -> str:
        """The highest level that a value reaches; "missed" below the promise, "reported" without one."""
        levels = [level for level in LEVELS if getattr(self, level) is not None]
        if not levels:
            return "reported"
        sign = -1 if self.less else 1
        met = [level for level in levels if sign * value >= sign * getattr(self, level)]
        return (
            {"must": "met", "target": "met, target", "moonshot": "met, moonshot"}[met[-1]]
            if met
            else "missed"
        )

    def levels(self) -> str:
        """must / target / moonshot as text."""
        numbers = [getattr(self, level) for level in LEVELS]
        if all(n is None for n in numbers):
            return "-"
        sign = "<= " if self.less else ">= "
        while numbers[-1] is None:
            numbers.pop()
        return sign + " / ".join("-" if n is None else self.unit.format(n) for n in numbers)


@dataclass(frozen=True)
class Verdict:
    goal: Goal
    value: float | None
    verdict: str
    why: str


def load(device: str) -> list[Goal]:
    """The goals for a device, in the order of the file."""
    benches = yaml.safe_load(FILE.read_text(encoding="utf-8"))[device]
    return [Goal(device, bench, **line) for bench, lines in benches.items() for line in lines]


def judge(
    goal: Goal, results: Mapping[str, Mapping[str, Any]], parts: Mapping[str, Mapping[str, Any]]
) -> Verdict:
    """Look a goal up in the results (by bench); `parts` says why a bench has none."""
    if goal.bench not in results:
        part = parts.get(goal.bench, {})
        if goal.absent:
            return Verdict(goal, None, "not measured", goal.absent)
        why = f"{part['status']}: {part['why']}" if part.get("why") else f"{goal.bench} was not run"
        return Verdict(goal, None, "not measured", why)
    found = sorted(measured(goal, results[goal.bench]["rows"]), key=lambda pair: pair[0])
    if not found:
        return Verdict(goal, None, "not measured", f"{goal.bench} has no such row")
    value, row = found[-1] if goal.less != goal.best else found[0]
    many = f"the {'best' if goal.best else 'worst'} of {len(found)}: " if len(found) > 1 else ""
    return Verdict(goal, value, goal.reached(value), many + describe(row))


def measured(goal: Goal, rows: list[Row]) -> Iterator[tuple[float, Row]]:
    """(value, row) of every row that a goal speaks of."""
    for row in rows:
        wanted = ((goal.name, "name"), (goal.case, "case"), (goal.contender, "contender"))
        if all(re.fullmatch(pattern, str(row[field])) for pattern, field in wanted):
            value = value_of(goal.measure, row, rows)
            if value is not None:
                yield value, row


def value_of(measure: str, row: Row, rows: list[Row]) -> float | None:
    """A field of the row, or one of these.

    us; per_second: items; recipe_hours: for 30 epochs of the paper's pairs; memory, saved: its peak bytes,
    or those kept for the backward, over ours.
    """
    if measure == "us":
        return row["median_s"] * 1e6
    if measure == "per_second":
        return row["items"] / row["median_s"]
    if measure == "recipe_hours":
        return RECIPE_PAIRS * row["median_s"] / row["items"] / 3600
    if measure in COMPARED:
        field = COMPARED[measure]
        same = [r for r in rows if all(r[key] == row[key] for key in ("name", "case"))]
        own = next((r.get(field) for r in same if r["contender"] == "ours"), None)
        return row[field] / max(own, 1) if own is not None and field in row else None
    return row.get(measure)


def describe(row: Row) -> str:
    """Where a number comes from, with its spread."""
    text = f"{row['name']}, {row['case']}, {row['contender']}"
    if "median_s" not in row:
        return text
    times = (seconds(row[key]) for key in ("median_s", "p10_s", "p90_s"))
    return text + " {} ({} to {})".format(*times)


def seconds(value: float) -> str:
    """Three digits and a unit."""
    for unit, factor in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"
