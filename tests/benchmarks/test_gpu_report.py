"""gpu_report.sh goes through to the end whatever fails on the way; what a GPU machine has are stubs here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_report.sh"
PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
case "$*" in
    "-c import torch") exit "${TORCH:-0}" ;;
    *is_available*) echo cuda ;;
    *get_device_capability*) echo 90 ;;
    *"pip install"*) sleep "${PIP_SLEEPS:-0}"; exit "${PIP:-0}" ;;
    *build_ext*) exit "${IN_PLACE:-0}" ;;
    *bench.py*) echo "CUDAARCHS=${CUDAARCHS:-} PYTHONPATH=$PYTHONPATH" >> "$CALLS"; exit "${BENCH:-0}" ;;
    "-c print("*) exec "$REAL_PYTHON" "$@" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout that holds the script alone, and a python that writes down how it is called."""
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(SCRIPT, tmp_path / "benchmarks")
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def run(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHON": str(checkout / "python"), "REAL_PYTHON": sys.executable} | environment
    environment["CALLS"] = str(checkout / "calls")
    clean = {name: value for name, value in os.environ.items() if name not in ("OUT", "PYTHONPATH")}
    return subprocess.run(
        [str(checkout / "benchmarks/gpu_report.sh"), *arguments],
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def calls(checkout: Path) -> str:
    return (checkout / "calls").read_text()


def build_record(checkout: Path) -> dict[str, object]:
    return json.loads((checkout / "build/gpu_report/parts/parts.json").read_text())["build"]


def test_builds_offline_for_this_gpu_then_measures(checkout):
    done = run(checkout, str(checkout / "out"))
    assert done.returncode == 0, done.stderr
    assert "pip install --no-build-isolation --no-deps --editable ." in calls(checkout)
    assert "build_ext" not in calls(checkout)
    assert "bench.py --device cuda --output build/gpu_report/parts --minutes 8." in calls(checkout)
    assert "CUDAARCHS=90" in calls(checkout)
    assert build_record(checkout)["status"] == "done"


def test_without_pip_it_compiles_in_place(checkout):
    assert run(checkout, PIP="1").returncode == 0
    assert "setup.py build_ext --inplace" in calls(checkout)
    assert build_record(checkout)["status"] == "done"


def test_a_build_that_fails_is_recorded_and_the_rest_goes_on(checkout):
    assert run(checkout, PIP="1", IN_PLACE="2").returncode == 0
    assert build_record(checkout) | {"seconds": 0} == {
        "status": "failed",
        "seconds": 0,
        "why": "status 2, see logs/build.log",
    }
    assert "bench.py" in calls(checkout)


def test_a_build_that_hangs_is_cut_off(checkout):
    assert run(checkout, PIP_SLEEPS="30", BUILD_SECONDS="1").returncode == 0
    assert build_record(checkout)["status"] == "cut off"
    assert "bench.py" in calls(checkout)


def test_measurements_that_break_down_are_said(checkout):
    done = run(checkout, "--no-build", "--only", "ceilings,scaling", BENCH="7")
    assert done.returncode == 7
    assert "ended with status 7" in done.stdout
    assert build_record(checkout)["status"] == "left out"
    assert "--only ceilings,scaling" in calls(checkout)


def test_wheels_go_into_a_folder_of_their_own(checkout):
    wheels = checkout / "wheels"
    wheels.mkdir()
    (wheels / "ftfy-6-py3-none-any.whl").touch()
    assert run(checkout, "--wheels", str(wheels)).returncode == 0
    assert f"--target build/gpu_report/site {wheels}/ftfy-6-py3-none-any.whl" in calls(checkout)
    assert f"PYTHONPATH={checkout}/build/gpu_report/site:{checkout}" in calls(checkout)


def test_without_torch_or_with_a_wrong_option_it_is_one_line(checkout):
    done = run(checkout, TORCH="1")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "has no torch" in done.stderr
    assert run(checkout, "--gpu").returncode == 2
    assert "--only PARTS" in run(checkout, "--help").stdout


def test_where_there_is_no_gpu_the_other_parts_run(tmp_path):
    """The real script and the real runner, in a copy of what they read."""
    for name in ("benchmarks", "groupvit_fast"):
        (tmp_path / name).mkdir()
        for path in (ROOT / name).iterdir():
            (tmp_path / name / path.name).symlink_to(path)
    os.remove(tmp_path / "benchmarks/gpu_report.sh")
    shutil.copy(SCRIPT, tmp_path / "benchmarks")
    out = tmp_path / "out"
    done = run(tmp_path, "--no-build", "--cpu", "--only", "ceilings", PYTHON=sys.executable, OUT=str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in out.iterdir()} == {"report.md", "results.tar.gz"}
    text = (out / "report.md").read_text()
    assert "| build | left out | 0 s | asked for with --no-build |" in text
    assert "| ceilings | done |" in text
    with tarfile.open(out / "results.tar.gz") as archive:
        names = archive.getnames()
    assert {"parts/ceilings.json", "parts/parts.json", "parts/logs/environment.log"} <= set(names)


@pytest.mark.skipif(
    shutil.which("shellcheck", path=Path(sys.executable).parent) is None, reason="no shellcheck"
)
def test_shellcheck_finds_nothing():
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
