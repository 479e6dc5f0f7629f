"""The common form of the benchmarks' JSON: who was measured, on what, with what."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import machine
from stopwatch import Timing

TIMINGS = {"eager": Timing(8e3, 7e3, 9e3, 11), "ours": Timing(2e3, 1e3, 3e3, 11)}


def test_rows_are_flat_and_in_seconds():
    rows = machine.timing_rows("op forward", "B2", TIMINGS, bytes=64, peak_bytes={"ours": 5})
    assert rows[0] == {
        "name": "op forward",
        "case": "B2",
        "contender": "eager",
        "median_s": 8,
        "p10_s": 7,
        "p90_s": 9,
        "calls": 11,
        "ratio": 4.0,
        "bytes": 64,
    }
    assert rows[1]["ratio"] == 1
    assert rows[1]["peak_bytes"] == 5


def test_without_ours_there_is_no_ratio():
    assert machine.timing_rows("op", "B2", {"eager": TIMINGS["eager"]})[0]["ratio"] is None


def test_the_file_says_what_the_numbers_belong_to(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(machine.ROOT / "benchmarks/x_bench.py"), "--seconds", "1"])
    path = tmp_path / "x.json"
    rows = [machine.value_row("miou", "voc21", "ours", 0.5, "")]
    machine.write_result(path, "x_bench", rows, dtype="float32")
    result = json.loads(path.read_text())
    assert result["bench"] == "x_bench"
    assert result["settings"] == {"dtype": "float32"}
    assert result["rows"] == rows
    found = result["machine"]
    assert found["cpu"]["model"]
    assert found["cpu"]["cores"] >= 1
    assert found["versions"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["command"].endswith("benchmarks/x_bench.py --seconds 1")
    assert str(machine.ROOT) not in found["command"]
    assert found["slug"] == machine.slug()
    assert found["slug"].strip("-abcdefghijklmnopqrstuvwxyz0123456789") == ""
    assert found["cpu"]["model"] in machine.one_line(found)


@pytest.mark.parametrize("command", [("no-such-program",), ("false",)])
def test_a_program_that_is_absent_or_fails_says_nothing(command):
    assert machine._output(*command) == ""


def test_a_gpu_is_described_with_its_driver(monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '580.65.06, 1980 MHz, 2619 MHz, 31, 112.40 W'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", total_memory=80 << 30, major=9, minor=0, multi_processor_count=132
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: properties.name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found = machine.describe("cuda")
    assert found["slug"] == "nvidia-h100-80gb-hbm3"
    assert found["gpu"]["driver"] == "580.65.06"
    assert found["gpu"]["clocks"] == "1980 MHz, 2619 MHz, 31, 112.40 W"
    assert found["gpu"]["capability"] == "9.0"
    assert "NVIDIA H100 80GB HBM3, driver 580.65.06" in machine.one_line(found)
