"""Curves as inline SVG: lines over steps, axes with round numbers, colours from the style of the page."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 460, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 8, 24
MOST_POINTS = 400
"""Points drawn of a line; of longer ones, means of neighbours."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A named sequence of (step, value); `dots` marks each value, for lines of few."""

    name: str
    points: Sequence[Point]
    dots: bool = False


def chart(title: str, lines: Sequence[Line], *, zero: bool = False, unit: str = "") -> str:
    """A figure with a legend, or nothing if no line has a finite point. `zero`: the axis begins at 0."""
    lines = [Line(line.name, thinned(finite(line.points)), line.dots) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    across = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 1, max(xs) + 1)
    marks = ticks(0.0, max(ys) or 1.0) if zero else ticks(min(ys), max(ys))
    up = marks[0], marks[-1]
    drawn = [_axes(marks, up, ticks(*across, inside=True), across)]
    drawn += [_line(line, number, across, up) for number, line in enumerate(lines)]
    values = {"left": LEFT, "right": WIDTH - RIGHT, "from": across[0], "to": across[1], "unit": unit}
    values["lines"] = [{"name": line.name, "points": _rounded(line.points)} for line in lines]
    data = html.escape(json.dumps(values), quote=True)
    legend = "".join(
        f'<li class="l{number}">{html.escape(line.name)}</li>' for number, line in enumerate(lines)
    )
    return (
        f'<figure class="card chart"><figcaption><h3>{html.escape(title)}</h3><ul>{legend}</ul></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}" '
        f'data-chart="{data}">{"".join(drawn)}<line class="hair" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
        "</figure>"
    )


def finite(points: Sequence[tuple[float, float | None]]) -> list[Point]:
    return [(x, y) for x, y in points if y is not None and math.isfinite(y)]


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most `MOST_POINTS` points: means of equal numbers of neighbours, the last point kept as it is."""
    size = math.ceil(len(points) / MOST_POINTS)
    if size <= 1:
        return list(points)
    groups = [points[start : start + size] for start in range(0, len(points) - 1, size)]
    means = [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups
    ]
    return [*means, points[-1]]


def ticks(low: float, high: float, *, inside: bool = False) -> list[float]:
    """Three to seven round numbers: around low..high, or with `inside` only those between."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = (math.ceil, math.floor) if inside else (math.floor, math.ceil)
    begin, end = (
        first(low / step - 1e-9 * (1 if inside else -1)),
        last(high / step + 1e-9 * (1 if inside else -1)),
    )
    return [number * step for number in range(begin, end + 1)]


def short(value: float) -> str:
    """1200000 -> 1.2M, 0.00004 -> 4e-05."""
    size = abs(value)
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            factor = 1e3 if suffix == "k" else limit
            return f"{value / factor:.4g}{suffix}"
    return f"{value:.3g}" if 0 < size < 1000 and size % 1 else f"{value:g}"


def _axes(marks: list[float], up: Point, steps: list[float], across: Point) -> str:
    parts = []
    for value in marks:
        y = _place(value, up, HEIGHT - BOTTOM, TOP)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{short(value)}</text>')
    for value in steps:
        x = _place(value, across, LEFT, WIDTH - RIGHT)
        parts.append(f'<text x="{x}" y="{HEIGHT - 8}" text-anchor="middle">{short(value)}</text>')
    return "".join(parts)


def _line(line: Line, number: int, across: Point, up: Point) -> str:
    places = [
        (_place(x, across, LEFT, WIDTH - RIGHT), _place(y, up, HEIGHT - BOTTOM, TOP)) for x, y in line.points
    ]
    drawn = f'<polyline class="l{number}" points="{" ".join(f"{x},{y}" for x, y in places)}"/>'
    if line.dots or len(places) == 1:
        drawn += "".join(f'<circle class="l{number}" cx="{x}" cy="{y}" r="3"/>' for x, y in places)
    return drawn


def _place(value: float, span: Point, first: float, last: float) -> float:
    return round(first + (value - span[0]) / (span[1] - span[0]) * (last - first), 1)


def _rounded(points: Sequence[Point]) -> list[list[float]]:
    return [[round(x, 1), float(f"{y:.4g}")] for x, y in points]
