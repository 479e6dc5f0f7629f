"""How much the results of runs that differ in their seed alone differ."""

from __future__ import annotations

import statistics
from typing import Any

NUMBERS = ("loss", "contrastive", "multi_label", "groups_in_use", "miou", "oracle_miou")


def seed_summary(results: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """From `result.json` of each seed: the numbers of every run, and their mean, spread and range.

    `std` is the sample standard deviation.
    """
    runs = [{"seed": seed, **_numbers(result)} for seed, result in results.items()]
    summary: dict[str, Any] = {"seeds": list(results), "runs": runs}
    for name in NUMBERS:
        values = [run[name] for run in runs if run.get(name) is not None]
        if len(values) == len(runs):
            spread = statistics.stdev(values) if len(values) > 1 else None
            summary[name] = {
                "mean": statistics.fmean(values), "std": spread, "min": min(values), "max": max(values),
            }  # fmt: skip
    return summary


def seed_table(summary: dict[str, Any]) -> str:
    """The summary as lines for people."""
    lines = [f"{len(summary['seeds'])} seeds{'mean':>16}{'std':>12}{'min':>12}{'max':>12}"]
    for name in NUMBERS:
        if name in summary:
            row = summary[name]
            std = "-" if row["std"] is None else f"{row['std']:.4f}"
            lines.append(f"{name:<13}{row['mean']:>10.4f}{std:>12}{row['min']:>12.4f}{row['max']:>12.4f}")
    return "\n".join(lines)


def _numbers(result: dict[str, Any]) -> dict[str, Any]:
    """The last logged means of training, and the final scores if there was an evaluation."""
    both = {**result["training"], **{name: result.get(name) for name in ("miou", "oracle_miou")}}
    return {name: both.get(name) for name in NUMBERS}
