"""Few cases that hold every pair of values of any two axes: a greedy cover, the same on every run."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

TRIES = 8  # rows tried for each one that is kept


def cover(axes: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Rows {axis: value} in which any two values of different axes meet at least once."""
    draw = random.Random(seed)
    names = list(axes)
    missing = {
        ((one, i), (other, j))
        for one, other in itertools.combinations(range(len(names)), 2)
        for i in range(len(axes[names[one]]))
        for j in range(len(axes[names[other]]))
    }
    rows = []
    while missing:
        first = min(missing)
        row = max(
            (_row(first, names, axes, missing, draw) for _ in range(TRIES)), key=lambda r: _gain(r, missing)
        )
        missing -= _pairs(row)
        rows.append({names[axis]: axes[names[axis]][value] for axis, value in sorted(row.items())})
    return rows


def _row(pair, names, axes, missing, draw) -> dict[int, int]:
    """A row with the given pair; the other axes, in random order, take what covers most."""
    row = dict(pair)
    others = [axis for axis in range(len(names)) if axis not in row]
    draw.shuffle(others)
    for axis in others:
        values = list(range(len(axes[names[axis]])))
        draw.shuffle(values)
        row[axis] = max(values, key=lambda v: sum(_pair(axis, v, *item) in missing for item in row.items()))
    return row


def _pair(axis, value, other, other_value):
    return tuple(sorted(((axis, value), (other, other_value))))


def _pairs(row):
    return set(itertools.combinations(sorted(row.items()), 2))


def _gain(row, missing) -> int:
    return len(_pairs(row) & missing)
