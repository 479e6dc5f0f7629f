"""Charts from the JSON of the benchmarks, as SVG that can be read on a light and on a dark page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from groupvit_fast.console import UserError

# Grey ink and transparent ground: the page behind may be white or black. Colours differ in lightness too.
INK = "#7d8590"
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#d55e00", "#0072b2", "#999933", "#888888")
STYLE = {
    "svg.fonttype": "path", "svg.hashsalt": "groupvit_fast", "font.size": 9, "savefig.transparent": True,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.facecolor": "none", "figure.facecolor": "none", "legend.frameon": False, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "x", "grid.color": INK,
    "grid.alpha": 0.25,
}  # fmt: skip
Row = Mapping[str, Any]


def draw_all(results: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Path]:
    """A chart for every bench that has ratios, and one of scaling curves; none without matplotlib."""
    wanted = [(r["rows"], folder / f"{bench}.svg") for bench, r in results.items() if bench != "kernel_sweep"]
    try:
        return [path for rows, path in wanted if draw(rows, path)]
    except UserError:
        return []


def draw(rows: Sequence[Row], path: Path) -> Path | None:
    """The chart that fits the rows; None where they hold nothing to draw.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise UserError("plots need matplotlib: pip install 'groupvit_fast[plots]'") from None
    mpl.use("Agg")
    with mpl.rc_context(STYLE):
        return curves(rows, path) if any("axis" in row for row in rows) else gains(rows, path)


def _save(figure, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def gains(rows: Sequence[Row], path: Path) -> Path | None:
    """Bars for every case: how many times faster ours is than each contender; None without a contender."""
    import matplotlib.pyplot as plt

    compared = [row for row in rows if row.get("ratio") and row["contender"] != "ours"]
    if not compared:
        return None
    contenders = list(dict.fromkeys(row["contender"] for row in compared))
    cases: dict[str, list[Row]] = {}
    for row in compared:
        cases.setdefault(f"{row['name']}\n{row['case']}", []).append(row)
    most = max(map(len, cases.values()))
    height = 0.8 / most
    size = (8, max(0.45, 0.16 * most) * len(cases) + 1.1)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    for number, contender in enumerate(contenders):
        places, values = [], []
        for place, rows_of_case in enumerate(cases.values()):
            for slot, row in enumerate(rows_of_case):
                if row["contender"] == contender:
                    places.append(place + (slot - (len(rows_of_case) - 1) / 2) * height)
                    values.append(row["ratio"])
        bars = axes.barh(places, values, height, label=contender, color=COLOURS[number % len(COLOURS)])
        axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=7, color=INK)
    axes.axvline(1, color=INK, linewidth=1.2)
    axes.set_yticks(range(len(cases)), list(cases), fontsize=7)
    axes.set(xscale="log", xlabel="time of the contender over ours (right of 1: ours is faster)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.08)
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=min(len(contenders), 5))
    return _save(figure, path)


def curves(rows: Sequence[Row], path: Path) -> Path | None:
    """Time against size, one panel per axis, with the fitted exponent in the legend."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    panels = list(dict.fromkeys(row["axis"] for row in rows if "axis" in row))
    if not panels:
        return None
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(3.2 * columns, 2.9 * lines), layout="constrained", squeeze=False
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for panel, axes in zip(panels, grid.flat, strict=False):
        own = [row for row in rows if row.get("axis") == panel and "median_s" in row]
        exponents = {r["name"]: r["value"] for r in rows if r.get("axis") == panel and "value" in r}
        for number, name in enumerate(dict.fromkeys(row["name"] for row in own)):
            points = [row for row in own if row["name"] == name]
            sizes = [row["size"] for row in points]
            times = [row["median_s"] * 1e3 for row in points]
            label = f"{name}: {exponents[name]:.2f}" if name in exponents else name
            axes.loglog(sizes, times, "o-", color=COLOURS[number % len(COLOURS)], markersize=3, label=label)
            low, high = ([row[key] * 1e3 for row in points] for key in ("p10_s", "p90_s"))
            axes.fill_between(sizes, low, high, color=COLOURS[number % len(COLOURS)], alpha=0.2)
        sizes = sorted({row["size"] for row in own})
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes], fontsize=7)
        low, high = axes.get_ylim()
        if high < 10 * low:  # a flat curve shall look flat
            axes.set_ylim(low / 3, high * 3)
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set(xlabel=panel, ylabel="ms")
        axes.grid(axis="both")
        axes.legend(fontsize=6)
    return _save(figure, path)
