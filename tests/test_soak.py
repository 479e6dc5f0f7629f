"""Thousands of steps with the real loader, checkpoints and evaluations: nothing grows."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

STEPS = 6000
ARGUMENTS = [
    "--shapes-train", "96", "--shapes-val", "2", "--batch-size", "4", "--multi-label", "2", "--model-ema",
    "--log-every", "10", "--save-every", "99", "--eval-every", "500", "--steps", str(STEPS),
    "--model", "image.width=16", "--model", "image.depths=[1,0]", "--model", "text.width=16",
    "--model", "text.layers=1", "--workers", "1", "--device", "cpu", "--quiet",
]  # fmt: skip


def look(process: int) -> tuple[int, int, int] | None:
    """Resident pages, open files and threads; None if the process has ended."""
    place = Path("/proc", str(process))
    try:
        pages = int((place / "statm").read_text().split()[1])
        return pages, len(os.listdir(place / "fd")), len(os.listdir(place / "task"))
    except (OSError, ValueError, IndexError):
        return None


def last_step(run: Path) -> int:
    path = run / "metrics.jsonl"
    return 10 * path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
def test_memory_files_and_threads_stay_constant(tmp_path):
    """Medians over the third sixth of the run and over the last; writes and evaluations come and go in both.

    A third is warm-up: memory is found, and each text of the small dataset is seen.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "groupvit_fast.train", *ARGUMENTS]
    places = ["--data-root", str(tmp_path / "data"), "--output", str(tmp_path / "run")]
    process = subprocess.Popen([*command, *places], env=env, stderr=subprocess.PIPE, text=True)
    seen = []
    while (found := look(process.pid)) is not None and process.poll() is None:
        seen.append((last_step(tmp_path / "run"), *found))
        time.sleep(0.02)
    said = process.communicate()[1]
    assert process.returncode == 0, said
    early = [one for step, *one in seen if STEPS / 3 < step <= STEPS / 2]
    late = [one for step, *one in seen if STEPS * 5 / 6 < step < STEPS]
    assert min(len(early), len(late)) > 100
    parts = (early, late)
    before, after = ([statistics.median(values) for values in zip(*part, strict=True)] for part in parts)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    curve = [json.loads(line)["memory_gb"] for line in lines]
    assert after[0] < 1.01 * before[0], curve[:: len(curve) // 40]
    assert after[1:] == before[1:], "open files and threads"
