"""A process that is killed, frozen or stuck ends all of them, by name; nobody waits for ever."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import launch

from groupvit_fast.training import distributed, watchdog
from groupvit_fast.training.watchdog import GONE, Watchdog

SECONDS = 4.0
ENDS = {"none": 0.0, "late": 2.0}
"""How much later than its neighbour a process comes to the end."""


def work(fault: str, folder: str) -> None:
    """What one of the processes does: steps in common, of which rank 1 disturbs one."""
    with (
        distributed.session("cpu") as world,
        Watchdog(world, SECONDS, last_checkpoint=lambda: "run/step_7") as watch,
    ):
        for step in range(10**9):
            watch.at(step, "data")
            if step == 20 and world.rank == 1:
                Path(folder, "ready").write_text(str(os.getpid()))
                disturb(fault)
            if fault in ENDS and step == 30:
                time.sleep(ENDS[fault] * world.rank)
                break
            watch.at(step, "step")
            torch.distributed.all_reduce(torch.ones(1))
            time.sleep(0.01)


def disturb(fault: str) -> None:
    if fault in ("SIGKILL", "SIGSTOP"):
        os.kill(os.getpid(), getattr(signal, fault))
    elif fault == "stuck":
        time.sleep(1000)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            "SIGKILL",
            r"rank 1 \(process {pid} on \S+\) has been silent for \d s, last .* after step \d+: it is ",
        ),
        (
            "SIGSTOP",
            r"rank 1 \(process {pid} on \S+\) has been silent for 4 s, last .* after step \d+: it is ",
        ),
        ("stuck", r"rank 1 \(process {pid} on \S+\) stands still for 4 s waiting for data after step 20"),
    ],
)
def test_the_other_processes_end_and_name_the_culprit(tmp_path, fault, words):
    first, second = launch(__file__, fault, tmp_path)
    while not (tmp_path / "ready").exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    begun = time.monotonic()
    said = first.communicate(timeout=60)[1]
    assert time.monotonic() - begun < SECONDS + 20
    if fault == "SIGSTOP":
        assert second.poll() is None
        second.kill()
    said += second.communicate(timeout=60)[1]
    assert first.returncode == GONE, said
    if fault == "stuck":
        assert second.returncode == GONE
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, said
    pid = (tmp_path / "ready").read_text()
    assert re.search(words.format(pid=pid), lines[0])
    assert "the last checkpoint is run/step_7, continue with --resume" in lines[0]


@pytest.mark.parametrize("end", ENDS)
def test_processes_that_end_well_are_not_accused(tmp_path, end):
    """Nor lost because the first, where the processes met, has gone already."""
    processes = launch(__file__, end, tmp_path)
    said = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said


@pytest.mark.parametrize(
    ("lines", "status", "words"),
    [
        ("", GONE, "error: training stands still for 1 s waiting for data after step 5"),
        ("seconds = 0", 0, ""),
        ("dog.at(5, 'evaluation')", 0, ""),
        (
            "watchdog.PATIENCE_AFTER_SIGNAL = 0.3; dog.signal = lambda: 15; dog.seconds = 50",
            143,
            "error: stopped waiting for data after step 5 without saving",
        ),
    ],
)
def test_one_process_alone(lines, status, words):
    program = f"""
import time
from groupvit_fast.training import watchdog
from groupvit_fast.training.distributed import World
seconds = 1.0
{lines if lines.startswith("seconds") else ""}
dog = watchdog.Watchdog(World(), seconds)
with dog:
    dog.at(5, "data")
    {"" if lines.startswith("seconds") else lines}
    time.sleep(1.6)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == status, done.stderr
    assert done.stderr.strip() == words


def test_a_place_in_words():
    assert Watchdog._where((3, "step")) == "in the step after step 3"
    assert Watchdog._where((3, "warm-up")) == "in the warm-up after step 3"
    assert set(watchdog.UNLIMITED) < set(watchdog.PHASES)


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2])
