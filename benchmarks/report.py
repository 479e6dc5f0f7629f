"""Markdown from the JSON of a results folder: what ran, goals, tables, plots.

python benchmarks/report.py build/bench    render a folder again
python benchmarks/report.py --docs         docs/performance.md from every folder of benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import goals
import plots
from goals import Verdict, seconds

from groupvit_fast.console import UserError, run_command, write_text_atomically

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs" / "performance.md"
RESULTS = HERE / "results"
NO_GPU = """No GPU was at hand. The CUDA kernels compile for their targets without a register spill, and their
sources run on the CPU in the tests; how fast they are is not known. `benchmarks/gpu_report.sh` fills this in.
What they will be held to:"""
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
Result = Mapping[str, Any]


def read_parts(folder: Path) -> dict[str, Any]:
    """What became of each part of the run, by name."""
    path = folder / "parts.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def read_results(folder: Path) -> dict[str, Result]:
    """Every result file of a folder by the name of its bench; files of one bench become one."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            continue  # a part that was cut off while it wrote; parts.json says so
        if isinstance(value, dict) and {"bench", "machine", "rows"} <= value.keys():
            before = found.get(value["bench"], {"rows": []})["rows"]
            found[value["bench"]] = value | {"rows": before + value["rows"]}
    return found


def verdicts(folder: Path) -> list[Verdict]:
    """All goals of the folder's device."""
    results, parts = read_results(folder), read_parts(folder)
    notes = folder / "notes.json"
    written = json.loads(notes.read_text(encoding="utf-8")) if notes.exists() else {}
    judged = [goals.judge(goal, results, parts) for goal in goals.load(_device(results))]
    return [
        Verdict(
            v.goal, v.value, v.verdict, f"{v.why}. {written[v.goal.key]}" if v.goal.key in written else v.why
        )
        for v in judged
    ]


def _device(results: Mapping[str, Result]) -> str:
    """What a folder is about: a GPU where any of its benches used one."""
    return "cuda" if any(r["machine"]["device"] == "cuda" for r in results.values()) else "cpu"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def goals_table(folder: Path) -> str:
    rows = []
    for v in verdicts(folder):
        value = "-" if v.value is None else v.goal.unit.format(v.value)
        rows.append([v.goal.what, v.goal.levels(), value, v.verdict, v.why])
    return table(["goal", "must / target / moonshot", "measured", "verdict", "where, and why"], rows)


def machine_list(results: Mapping[str, Result]) -> str:
    """Hardware and versions once, then each part's command, load and commit."""
    first = next(iter(results.values()))["machine"]
    cpu, gpu = first["cpu"], first["gpu"]
    lines = [
        f"- CPU: {cpu['model']}, {cpu['cores']} cores, level {cpu['level']} ({', '.join(cpu['features'])})"
    ]
    if gpu:
        lines.append(
            f"- GPU: {gpu['name']}, driver {gpu['driver']}, clocks and power at start: {gpu['clocks']}"
        )
    known = [f"{name} {value}" for name, value in first["versions"].items() if value]
    lines.append(f"- versions: {', '.join(known)}")
    parts = [
        [bench, f"`{m['command']}`", m["git"], m["date"], m["threads"], (m["load"] or ["-"])[0]]
        for bench, m in ((bench, result["machine"]) for bench, result in results.items())
    ]
    head = ["bench", "command", "commit", "finished", "threads", "load (1 min)"]
    return "\n".join(lines) + "\n\n" + table(head, parts)


def bench_table(result: Result) -> str:
    """All rows of a bench, one line per case and contender."""
    rows = []
    for row in result["rows"]:
        first = [row["name"], row["case"], row["contender"]]
        if "median_s" not in row:
            rows.append([*first, f"{row['value']:.4g} {row['unit']}", "", "", extras(row)])
            continue
        spread = f"{seconds(row['p10_s'])} to {seconds(row['p90_s'])}"
        ratio = f"{row['ratio']:.2f} x" if row.get("ratio") else ""
        rows.append([*first, seconds(row["median_s"]), spread, ratio, extras(row)])
    return table(["what", "case", "contender", "median", "p10 to p90", "over ours", ""], rows)


def extras(row: Mapping[str, Any]) -> str:
    """The rest that a row says, in short."""
    said = []
    if "items" in row and "median_s" in row:
        said.append(f"{row['items'] / row['median_s']:.4g} {row.get('unit', 'items')}/s")
    if "percent_of_copy" in row:
        said.append(f"{row['percent_of_copy']:.0f} % of copy")
    if "share_of_matmul" in row:
        said.append(f"{row['share_of_matmul']:.0%} of a matrix product's rate")
    if "peak_bytes" in row:
        said.append(f"peak {row['peak_bytes'] / 2**20:.1f} MB")
    if "saved_bytes" in row:
        said.append(f"{row['saved_bytes'] / 2**20:.2f} MB kept for the backward")
    if row.get("host_reads"):
        said.append(f"read by the host {row['host_reads']} times")
    return ", ".join(said)


def parts_table(folder: Path) -> str:
    records = read_parts(folder)
    rows = [[name, part["status"], f"{part['seconds']:.0f} s", part["why"]] for name, part in records.items()]
    return table(["part", "status", "time", "why"], rows)


def render(folder: Path) -> None:
    """Write report.md, goals.md and the plots of a folder."""
    results = read_results(folder)
    text = ["# Benchmark report", "## What ran", parts_table(folder)]
    if results:
        text += ["## Machine", machine_list(results), "## Goals", goals_table(folder)]
        write_text_atomically(folder / "goals.md", f"# Goals\n\n{goals_table(folder)}\n")
        drawn = {path.stem: path.name for path in plots.draw_all(results, folder)}
        for bench, result in results.items():
            text.append(f"## {bench}")
            text += [f"![{stem}]({name})" for stem, name in drawn.items() if stem.startswith(bench)]
            text.append(bench_table(result))
    write_text_atomically(folder / "report.md", "\n\n".join(text) + "\n")


def summary(folder: Path) -> str:
    """The last lines of a run: goals in short."""
    judged = verdicts(folder)
    width = max((len(v.goal.what) for v in judged), default=0)
    lines = [
        f"{v.goal.what:<{width}}  {'-' if v.value is None else v.goal.unit.format(v.value):>10}  {v.verdict}"
        for v in judged
        if v.verdict != "not measured"
    ]
    counted = sorted(v.verdict.split(",")[0] for v in judged)
    total = ", ".join(f"{len(list(group))} {verdict}" for verdict, group in groupby(counted))
    return "\n".join([*lines, f"goals: {total}"])


def write_docs(page: Path = DOCS, kept: Path = RESULTS) -> None:
    """Replace what stands between the markers of docs/performance.md, and draw its plots."""
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise UserError(f"{page}: the markers {BEGIN} and {END} are missing")
    folders = [folder for folder in sorted(kept.glob("*/")) if read_results(folder)]
    blocks = [block for folder in folders for block in _docs_of(folder)]
    if not any(_device(read_results(folder)) == "cuda" for folder in folders):
        blocks += [
            "## Not measured: GPUs",
            NO_GPU,
            table(["goal", "must / target / moonshot"], _open_goals()),
        ]
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_text_atomically(page, before + "\n\n".join([BEGIN, *blocks, END]) + after)


def _docs_of(folder: Path) -> list[str]:
    results = read_results(folder)
    link = f"../benchmarks/results/{folder.name}"
    blocks = [f"## Results: {folder.name}", machine_list(results), "### Goals", goals_table(folder)]
    for path in plots.draw_all(results, folder):
        blocks += [f"### {path.stem}", f"![{path.stem}]({link}/{path.name})"]
    return [*blocks, f"Every row, with its spread: [{folder.name}/report.md]({link}/report.md)."]


def _open_goals() -> list[list[str]]:
    return [[goal.what, goal.levels()] for goal in goals.load("cuda")]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR", help="folders of results")
    parser.add_argument("--docs", action="store_true", help="write docs/performance.md too")
    arguments = parser.parse_args(argv)
    for folder in arguments.folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        render(folder)
        print(summary(folder))
    if arguments.docs:
        write_docs()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
