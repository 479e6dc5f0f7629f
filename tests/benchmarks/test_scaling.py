"""Scaling curves: the fit finds the exponent, and a curve that grows too fast is said."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import goals
import scaling
import scaling_ranks
from scaling import Curve
from stopwatch import Timing

from groupvit_fast.console import run_command

SIZES = (1, 2, 4, 8, 16)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_the_fit_finds_a_power_law(power):
    assert scaling.exponent(SIZES, [3 * size**power for size in SIZES]) == pytest.approx(power)


def test_a_constant_cost_of_small_sizes_does_not_hide_the_law():
    assert scaling.exponent(SIZES, [100, 100, 100, 200, 400]) == pytest.approx(1)


def rows(power: float):
    timings = {size: Timing(2.0 * size**power, size**power, 3.0 * size**power, 5) for size in SIZES}
    return scaling.curve_rows(Curve("batch", "op", 1, SIZES, lambda size: lambda: None), timings)


def test_a_curve_worse_than_theory_is_said_and_missed(capsys):
    scaling.tell(rows(1.3))
    assert "worse than theory" in capsys.readouterr().out
    scaling.tell(rows(1.1))
    assert "worse than theory" not in capsys.readouterr().out
    goal = next(goal for goal in goals.load("cpu") if goal.bench == "scaling")
    assert goals.judge(goal, {"scaling": {"rows": rows(1.3)}}, {}).verdict == "missed"
    assert goals.judge(goal, {"scaling": {"rows": rows(1.1)}}, {}).verdict == "met"


def test_a_real_curve(tmp_path):
    path = tmp_path / "scaling.json"
    arguments = ["--device", "cpu", "--only", "decode_masks", "--seconds", "0", "--json", str(path)]
    assert run_command(scaling.main, arguments) == 0
    found = json.loads(path.read_text())["rows"]
    assert {row["axis"] for row in found} == {"classes", "side of the labels, px"}
    assert all("p10_s" in row or row["excess"] == row["value"] - row["theory"] for row in found)


def test_an_unknown_curve(capsys):
    assert run_command(scaling.main, ["--device", "cpu", "--only", "no such"]) == 1
    assert "no curve" in capsys.readouterr().err


FAULTS = """
import resource, sys
import stopwatch, torch
if sys.argv[1] == "keep":
    assert stopwatch.keep_released_memory()
def call():
    torch.ones(9 << 20)  # more than the 32 MiB that glibc ever keeps by itself
for _ in range(10):
    call()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
call()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize(("mode", "least", "most"), [("keep", 0, 100), ("as it is", 1000, 10**6)])
def test_memory_that_is_kept_costs_no_page_faults(mode, least, most):
    command = [sys.executable, "-c", FAULTS, mode]
    environment = os.environ | {"PYTHONPATH": str(Path(scaling.__file__).parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert least <= int(done.stdout) <= most


@pytest.mark.slow
def test_processes_are_timed_together():
    arithmetic, messages = scaling_ranks.measure((1, 2))
    assert (set(arithmetic), set(messages)) == ({1, 2}, {2})
    timings = [*arithmetic.values(), *messages.values()]
    assert all(timing.calls == scaling_ranks.ROUNDS and timing.low > 0 for timing in timings)


def test_messages_are_reported_and_the_arithmetic_is_judged(monkeypatch, capsys):
    """Messages that grow as the square of the processes are said, and are no curve."""
    parts = [{n: Timing(n**power, n**power, n**power, 5) for n in (1, 2, 4, 8)} for power in (1, 2)]
    monkeypatch.setattr(scaling_ranks, "measure", lambda worlds: parts)
    found = scaling.processes_rows()
    assert [row["value"] for row in found if "excess" in row] == [pytest.approx(1)]
    assert sum(row["name"] == scaling_ranks.MESSAGES for row in found) == 4
    scaling.tell(found)
    assert "1 to 8 ms  exponent  1.00" in capsys.readouterr().out
