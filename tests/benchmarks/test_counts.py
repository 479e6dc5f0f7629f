"""Work that can be counted does not grow unnoticed: instructions, launches, bytes, allocations."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import counts
import counts_instructions
from machine import MISSED

from groupvit_fast.console import run_command

REMEDY = "if the growth is meant, run: python benchmarks/counts.py --update"


@pytest.mark.parametrize("section", counts.SECTIONS)
def test_nothing_grew(section):
    known = counts.load()
    why = counts.obstacle(section, known)
    if why:
        pytest.skip(why)
    _, larger = counts.compare(section, known)
    assert not larger, "\n".join([*larger, REMEDY])


def test_growth_is_seen():
    known = {"launches": 2, "bytes": 1000, "instructions": 100_000}
    assert counts.grown(known, known) == []
    assert counts.grown({"launches": 2, "bytes": 1030, "instructions": 1}, known) == []
    assert counts.grown({"launches": 3}, known) == ["launches: 3 instead of 2 (+50.0%)"]
    assert counts.grown({"bytes": 1031}, known) == ["bytes: 1,031 instead of 1,000 (+3.1%)"]
    assert counts.grown({"new": 1}, known) == ["new: 1, and no count was committed for it"]


DUMP = """desc: Trigger: Client Request: an operator
events: Ir
ob=/lib/libc.so
fn=copy
10 1000
ob=/somewhere/_C.so
fn=kernel
12 500
+3 40
cob=/lib/libc.so
cfn=copy
calls=2 10
* 9999
-1 2
ob=/lib/libc.so
fn=other
7 77
"""


def test_only_our_own_instructions_count(tmp_path):
    """Neither those of other libraries nor what a called function spent."""
    path = tmp_path / "out.1"
    path.write_text(DUMP)
    assert counts_instructions.read_dump(path) == ("an operator", 542)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """One section whose count the test sets; the file of counts is the test's own."""
    section = SimpleNamespace(count=100, here={"compiler": "c 1"})
    section.measure = lambda: {"work": section.count}
    section.conditions = lambda: section.here
    monkeypatch.setattr(counts, "SECTIONS", {"fake": section})
    monkeypatch.setattr(counts, "BASELINE", tmp_path / "counts.json")
    return section


def test_update_then_compare(fake, tmp_path, capsys):
    assert run_command(counts.main, ["--update"]) == 0
    assert run_command(counts.main, ["--json", str(tmp_path / "rows.json")]) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert (row["name"], row["value"], row["committed"]) == ("fake: work", 100, 100)
    fake.count = 104
    assert run_command(counts.main, []) == MISSED
    assert capsys.readouterr().out.endswith("work: 104 instead of 100 (+4.0%)\n")


def test_another_compiler_has_other_counts(fake, capsys):
    run_command(counts.main, ["--update"])
    fake.count, fake.here = 200, {"compiler": "c 2"}
    assert run_command(counts.main, []) == 0
    assert (
        "left out: counted with {'compiler': 'c 1'}, here is {'compiler': 'c 2'}" in capsys.readouterr().out
    )


def test_what_cannot_run_here_keeps_its_counts(fake, capsys):
    run_command(counts.main, ["--update"])
    fake.count, fake.here = 200, "no valgrind"
    assert run_command(counts.main, ["--update"]) == 0
    assert counts.load()["fake"]["counts"] == {"work": 100}
    assert counts.obstacle("fake", counts.load()) == "no valgrind"
