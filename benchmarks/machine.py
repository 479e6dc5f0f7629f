"""One form for every benchmark's JSON: the machine and software that the numbers belong to, then flat rows.

A row is one contender in one case:

    {"name": "gumbel_assign forward", "case": "B32 64x196 C384", "contender": "eager",
     "median_s": 0.031, "p10_s": 0.030, "p90_s": 0.033, "calls": 41, "ratio": 8.2, ...}

`ratio` is the contender's median over that of "ours" in the same case: how many times faster ours is. A row
may say more, always in these words: `items` of a call (`unit` names them: "pairs", "images"), `bytes` that
must move, `flops`, `peak_bytes`. A number that is no time has `value` and `unit` instead of the times.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from stopwatch import Timing

import groupvit_fast
from groupvit_fast.console import write_json

ROOT = Path(__file__).resolve().parents[1]
OURS = "ours"
PACKAGES = ("numpy", "pillow", "transformers", "webdataset", "nvidia-dali-cuda130", "timm", "triton", "apex")
Row = dict[str, Any]
MISSED = 3
"""Exit status of a benchmark that ran to its end and whose numbers are worse than they should be."""


def timing_rows(name: str, case: str, timings: Mapping[str, Timing], **more: Any) -> list[Row]:
    """Rows of the contenders that were timed together; `more` goes into each row.

    A value of `more` that is a mapping from contender to number gives each contender its own.
    """
    own = timings[OURS].median if OURS in timings else None
    rows = []
    for contender, timing in timings.items():
        row: Row = {"name": name, "case": case, "contender": contender}
        row |= {"median_s": timing.median * 1e-3, "p10_s": timing.low * 1e-3, "p90_s": timing.high * 1e-3}
        row |= {"calls": timing.calls, "ratio": timing.median / own if own else None}
        for key, value in more.items():
            if not isinstance(value, Mapping):
                row[key] = value
            elif contender in value:
                row[key] = value[contender]
        rows.append(row)
    return rows


def value_row(name: str, case: str, contender: str, value: float, unit: str, **more: Any) -> Row:
    """A row for a number that is no time."""
    return {"name": name, "case": case, "contender": contender, "value": value, "unit": unit, **more}


def write_result(
    path: Path, bench: str, rows: Iterable[Row], *, device: str = "cpu", **settings: Any
) -> None:
    """Write rows with everything that a reader needs to repeat them; `settings` are the bench's own.

    A long bench calls this after every case, so that what it had is there when it is cut off.
    """
    write_json(path, {"bench": bench, "machine": describe(device), "settings": settings, "rows": list(rows)})


def describe(device: str = "cpu") -> dict[str, Any]:
    """Hardware, software, command and the load of the moment."""
    machine: dict[str, Any] = {"slug": slug(device), "device": device, "cpu": _cpu(), "gpu": None}
    if device == "cuda":
        machine["gpu"] = _gpu()
    machine |= {"versions": versions(), "git": _git(), "threads": torch.get_num_threads()}
    machine["load"] = [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None
    machine["command"] = " ".join([Path(sys.executable).name, *(_relative(part) for part in sys.argv)])
    machine["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return machine


def one_line(machine: Mapping[str, Any]) -> str:
    """The description for the head of a table."""
    cpu, gpu, version = machine["cpu"], machine["gpu"], machine["versions"]
    parts = [f"{gpu['name']}, driver {gpu['driver']}"] if gpu else []
    parts += [f"{cpu['model']}, {cpu['cores']} cores, {cpu['level']}", f"threads {machine['threads']}"]
    parts += [f"torch {version['torch']}", f"groupvit_fast {version['groupvit_fast']} ({machine['git']})"]
    if machine["load"]:
        parts.append(f"load {machine['load'][0]}")
    return "; ".join(parts)


def slug(device: str = "cpu") -> str:
    """A folder name for the results of this machine: "nvidia-h100", "amd-epyc-2-cores"."""
    if device == "cuda":
        return _slug_of(torch.cuda.get_device_name())
    cpu = _cpu()
    return _slug_of(f"{cpu['model']} {cpu['cores']} cores")


def versions() -> dict[str, Any]:
    """Versions of everything that decides a number; a package that is absent is left out."""
    info = groupvit_fast.build_info()
    known: dict[str, Any] = {"groupvit_fast": info["package"], "compiler": info["compiler"]}
    known |= {"built_for_cuda": info["cuda"], "cuda_architectures": info["cuda_architectures"]}
    known |= {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            known[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return known


def _cpu() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info = groupvit_fast.build_info()
    return {"model": name, "cores": cores, "features": info["cpu_features"], "level": info["cpu_level"]}


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    gpu = {"name": properties.name, "memory_bytes": properties.total_memory, "driver": None, "clocks": None}
    gpu |= {"capability": f"{properties.major}.{properties.minor}", "count": torch.cuda.device_count()}
    gpu["multiprocessors"] = properties.multi_processor_count
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw"
        answer = _output("nvidia-smi", query, "--format=csv,noheader", "-i", "0")
        fields = [field.strip() for field in answer.split(",")]
        if len(fields) == 5:
            gpu |= {"driver": fields[0], "clocks": ", ".join(fields[1:])}
    return gpu


def _git() -> str | None:
    """The commit, with "+" where files were changed; nothing outside a checkout."""
    commit = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    if not commit:
        return None
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", ":!benchmarks/results", ":!docs")
    return commit + ("+" if changed else "")


def _output(*command: str) -> str:
    """What a program prints, or nothing where it is absent or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _relative(argument: str) -> str:
    """Paths below the checkout as they are seen from it."""
    return argument.replace(f"{ROOT}{os.sep}", "")


def _slug_of(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
