"""Profiles of the slowest kernels, with ncu's output as a stub prints it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import cases
import profiles

from groupvit_fast.console import run_command
from groupvit_fast.ops import library

pytestmark = pytest.mark.skipif(not library.HAS_CPU, reason="nothing was compiled")
HEAD = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
TABLE = f"""==PROF== Connected to process 1
==PROF== Disconnected from process 1
{HEAD}
"0","1","void gvit::assign_kernel<float, (int)8>(gvit::AssignParams)","Duration","ns","12,345"
"0","1","void gvit::assign_kernel<float, (int)8>(gvit::AssignParams)","DRAM Throughput","%","71.5"
"0","1","void gvit::assign_kernel<float, (int)8>(gvit::AssignParams)","Block Size","","128"
"""


@pytest.fixture
def ncu(tmp_path, monkeypatch):
    """A program of that name with the given output and status."""

    def install(output: str, status: int = 0) -> None:
        path = tmp_path / "bin" / "ncu"
        path.parent.mkdir()
        path.write_text(f"#!/bin/sh\ncat <<'END'\n{output}END\nexit {status}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")

    return install


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    def small(device, dtype, *, full):
        return [lambda: cases.assign_case(2, 8, 30, 32, device, dtype)]

    monkeypatch.setattr(profiles, "official_cases", small)


def run(tmp_path: Path) -> dict:
    path = tmp_path / "profiles.json"
    assert (
        run_command(profiles.main, ["--device", "cpu", "--output", str(tmp_path), "--json", str(path)]) == 0
    )
    return json.loads(path.read_text())


def test_kernels_and_what_limits_them(ncu, tmp_path):
    ncu(TABLE)
    result = run(tmp_path)
    times = [row["value"] for row in result["rows"] if row["unit"] == "us"]
    assert times == sorted(times, reverse=True)
    assert "groupvit_fast::gumbel_assign_forward" in {row["name"] for row in result["rows"]}
    limits = {
        row["name"]: (row["case"], row["value"]) for row in result["rows"] if row["unit"] in ("ns", "%")
    }
    assert limits == {
        "Duration": ("assign_kernel #0", 12345.0),
        "DRAM Throughput": ("assign_kernel #0", 71.5),
    }
    assert (tmp_path / "ncu.csv").read_text().startswith(HEAD)
    assert result["settings"]["ncu"] == "ran"


def test_a_profiler_that_may_not_read_the_counters_says_so(ncu, tmp_path):
    said = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission"
    ncu(f"{said}\n", status=1)
    result = run(tmp_path)
    assert result["settings"]["ncu"] == said
    assert result["rows"]
    assert not (tmp_path / "ncu.csv").exists()


def test_names_of_kernels_are_found_by_their_plain_form():
    name = "void gvit::(anonymous namespace)::decode_kernel<float>(gvit::DecodeParams)"
    assert profiles._plain(name) == "decode_kernel"
    assert profiles._plain("groupvit_fast::gumbel_assign_forward") == "gumbel_assign_forward"
