"""Scaling curves: the fit finds the exponent, and a curve that grows too fast is said."""

from __future__ import annotations

import json
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


@pytest.mark.slow
def test_processes_are_timed_together():
    timings = scaling_ranks.measure((1, 2))
    assert set(timings) == {1, 2}
    assert all(timing.calls == scaling_ranks.ROUNDS and timing.low > 0 for timing in timings.values())
