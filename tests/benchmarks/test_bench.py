"""The runner of all benchmarks: a part that fails costs only itself."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench
from bench import Part

from groupvit_fast.console import run_command

WRITE = """
import sys
sys.path.insert(0, "benchmarks")
import machine
from stopwatch import Timing
timings = {"eager": Timing(40.0, 30.0, 50.0, 9), "ours": Timing(2.0, 1.0, 3.0, 9)}
rows = machine.timing_rows("gumbel_assign forward", "B32 64x196 C384", timings)
machine.write_result(__import__("pathlib").Path(sys.argv[1]), "kernel_bench", rows)
"""


def python(name: str, code: str, seconds: float = 60, **more: str) -> Part:
    return Part(name, seconds, (sys.executable, "-c", code, "{json}"), **more)


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch):
    monkeypatch.setattr(bench, "LEAST", 0.5)


@pytest.fixture
def only(monkeypatch):
    def use(*parts: Part) -> None:
        monkeypatch.setattr(bench, "CPU_PARTS", parts)

    return use


def run(output: Path, *arguments: str) -> int:
    return run_command(bench.main, ["--device", "cpu", "--output", str(output), *arguments])


def test_every_part_says_what_became_of_it_and_the_rest_goes_on(tmp_path, capsys, only):
    only(
        python("broken", "print('all well'); raise ImportError('no apex here')"),
        python("silent", "raise SystemExit(2)"),
        python("endless", "import time; time.sleep(60)", seconds=1.0),
        python("losing", "print('2 slower than plain PyTorch'); raise SystemExit(3)"),
        Part("absent", 9, ("no-such-program",)),
        Part("needy", 9, (sys.executable, "-c", ""), needs="no-such-tool"),
        Part("missing", 9, (sys.executable, "benchmarks/no_bench.py")),
        Part("tests", 9, (sys.executable, "-c", "print('.....'); print('5 passed in 0.1s')")),
        python("kernel_bench", WRITE),
    )
    assert run(tmp_path) == 0
    parts = json.loads((tmp_path / "parts.json").read_text())
    told = {name: (part["status"], part["why"]) for name, part in parts.items()}
    assert told == {
        "broken": ("failed", "status 1: ImportError: no apex here"),
        "silent": ("failed", "status 2: it said nothing"),
        "endless": ("cut off", "longer than 1 s"),
        "losing": ("missed", "ran to its end: 2 slower than plain PyTorch"),
        "absent": ("failed", "status 127: no-such-program: No such file or directory"),
        "needy": ("left out", "no-such-tool is not installed"),
        "missing": ("left out", "no_bench.py is not in this checkout"),
        "tests": ("done", "5 passed in 0.1s"),
        "kernel_bench": ("done", ""),
    }
    text = (tmp_path / "report.md").read_text()
    assert all(name in text for name in told)
    assert "20.00 x | met" in text
    last = capsys.readouterr().out.splitlines()[-3:]
    assert last[0].split()[-3:] == ["20.00", "x", "met"]
    assert "1 met" in last[1]
    assert last[2].endswith("6 of 9 parts did not finish")


def test_a_part_that_is_cut_off_leaves_no_process(tmp_path):
    code = "import os, time, subprocess, sys; print(os.getpid(), flush=True); time.sleep(60)"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    record = bench.run_part(python("endless", nested), tmp_path, "cpu", 2)
    assert record["status"] == "cut off"
    child = int((tmp_path / "logs/endless.log").read_text())
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _alive(child):
        time.sleep(0.05)
    assert not _alive(child)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()


def test_no_time_left_is_said(tmp_path, only):
    only(python("kernel_bench", WRITE))
    assert run(tmp_path, "--minutes", "0") == 0
    assert json.loads((tmp_path / "parts.json").read_text())["kernel_bench"]["why"] == "no time was left"


def test_a_failed_part_keeps_no_number_of_an_earlier_run(tmp_path, only):
    only(python("kernel_bench", WRITE))
    run(tmp_path)
    only(python("kernel_bench", "raise SystemExit(1)"))
    run(tmp_path)
    assert not (tmp_path / "kernel_bench.json").exists()
    assert "20.00 x" not in (tmp_path / "report.md").read_text()


def test_one_part_alone_keeps_what_the_others_wrote(tmp_path, only, capsys):
    only(python("kernel_bench", WRITE), python("other", "pass"))
    run(tmp_path)
    run(tmp_path, "--only", "other")
    assert set(json.loads((tmp_path / "parts.json").read_text())) == {"kernel_bench", "other"}
    assert "20.00 x" in (tmp_path / "report.md").read_text()
    assert run(tmp_path, "--only", "nothing") == 1
    assert "no part nothing; there are kernel_bench, other" in capsys.readouterr().err


@pytest.mark.parametrize("parts", [bench.CPU_PARTS, bench.GPU_PARTS], ids=["cpu", "cuda"])
def test_the_parts_are_well_formed(parts):
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        assert all(word in bench.PLACES or "{" not in word for word in part.command)


def test_the_limits_fit_the_promise():
    """The sweep comes last and takes what is left."""
    *parts, last = bench.CPU_PARTS
    assert last.name == "kernel_sweep"
    assert sum(part.seconds for part in parts) <= 14 * 60


@pytest.mark.parametrize(
    "part",
    [
        part
        for part in (*bench.CPU_PARTS, *bench.GPU_PARTS)
        if part.name.endswith(("_bench", "_large", "_bf16", "_loader", "_sweep"))
    ],
    ids=lambda part: part.name,
)
def test_the_benches_know_the_options_they_are_given(part):
    if not part.script.exists():
        pytest.skip("not in this checkout")
    module = importlib.import_module(part.script.stem)
    given = [{"{device}": "cpu", "{json}": "x.json"}.get(word, word) for word in part.command[2:]]
    assert module.parse(given).json == Path("x.json")
