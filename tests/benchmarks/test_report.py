"""Goals are read from the rows without flattery, and the report shows every row."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import goals
import machine
import report
from goals import Goal
from stopwatch import Timing

from groupvit_fast.console import run_command

GOAL = Goal("cpu", "kernel_bench", "key", "what", name="op .*", must=2, target=4)


def rows(name="op forward", case="B1", eager=8.0, own=2.0, **more):
    return machine.timing_rows(name, case, {"eager": timing(eager), "ours": timing(own)}, **more)


def timing(median):
    return Timing(median, 0.9 * median, 1.1 * median, 9)


def judged(goal, found):
    return goals.judge(goal, {"kernel_bench": {"rows": found}}, {})


@pytest.mark.parametrize(
    ("own", "verdict"), [(1.0, "met, target"), (2.0, "met, target"), (4.0, "met"), (4.1, "missed")]
)
def test_the_verdict_follows_the_ratio(own, verdict):
    assert judged(GOAL, rows(own=own)).verdict == verdict


def test_the_worst_row_counts():
    found = judged(GOAL, rows() + rows("op backward", eager=3.0) + rows("other", eager=0.1))
    assert found.value == 1.5
    assert found.verdict == "missed"
    assert found.why == "the worst of 2: op backward, B1, eager 3 ms (2.7 ms to 3.3 ms)"


def test_less_can_be_better():
    goal = Goal("cpu", "kernel_bench", "", "", "op .*", contender="ours", measure="us", less=True, must=3e3)
    assert judged(goal, rows()).verdict == "met"
    assert judged(goal, rows() + rows("op backward", own=4.0)).verdict == "missed"
    assert goal.levels() == "<= 3000.00 x"


def test_the_best_of_several_settings_can_count():
    goal = Goal(
        "cuda", "kernel_bench", "", "", "op .*", measure="per_second", best=True, must=400, contender=".*"
    )
    found = judged(goal, rows(items=3) + rows("op backward", eager=4.0, items=3))
    assert found.value == pytest.approx(1500)
    assert found.why.startswith("the best of 4: ")


def test_files_of_one_bench_are_read_together(tmp_path):
    machine.write_result(tmp_path / "a.json", "kernel_bench", rows())
    machine.write_result(tmp_path / "b.json", "kernel_bench", rows("op backward"))
    (result,) = report.read_results(tmp_path).values()
    assert len(result["rows"]) == 4


def test_memory_is_that_of_the_same_case():
    goal = Goal("cpu", "kernel_bench", "", "", "op .*", measure="memory", must=3)
    peaks = {"eager": 600, "ours": 100}
    assert judged(goal, rows(peak_bytes=peaks) + rows(case="B2", peak_bytes={"ours": 500})).value == 6
    assert judged(goal, rows()).verdict == "not measured"


def test_the_rest_of_the_measures():
    def value(measure, found, **row):
        goal = Goal("cpu", "kernel_bench", "", "", "op .*", measure=measure, must=0, less=True, **row)
        return judged(goal, found)

    kept = rows(saved_bytes={"eager": 500, "ours": 10}, host_reads={"ours": 0})
    assert value("saved", kept).value == 50
    assert value("host_reads", kept, contender="ours").verdict == "met"
    assert value("host_reads", kept).verdict == "not measured"
    assert value("recipe_hours", rows(items=861), contender="ours").value == pytest.approx(2e3 / 3.6e3)
    assert Goal("cpu", "", "", "", "", must=0, less=True).levels() == "<= 0.00 x"


def test_a_goal_that_cannot_be_measured_says_why():
    goal = Goal("cpu", "quality", "", "", "miou", must=1, absent="needs the weights")
    assert goals.judge(goal, {}, {}).why == "needs the weights"


def test_what_is_not_there_is_not_measured():
    parts = {"kernel_bench": {"status": "failed", "why": "status 1: no apex"}}
    assert goals.judge(GOAL, {}, parts).why == "failed: status 1: no apex"
    assert goals.judge(GOAL, {}, {}).why == "kernel_bench was not run"
    assert judged(GOAL, []).verdict == "not measured"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_goals_of_the_file_are_well_formed(device):
    loaded = goals.load(device)
    assert len({goal.key for goal in loaded}) == len(loaded)
    for goal in loaded:
        given = [n for n in (goal.must, goal.target, goal.moonshot) if n is not None]
        assert given == sorted(given, reverse=goal.less), goal.key
        assert goal.levels()


def test_a_folder_is_rendered(tmp_path):
    found = rows(peak_bytes={"eager": 1 << 20}, items=3, unit="pairs")
    found.append(machine.value_row("quality", "c", "ours", 0.5, "mIoU"))
    machine.write_result(tmp_path / "k.json", "kernel_bench", found)
    (tmp_path / "half.json").write_text('{"bench": "x"')
    (tmp_path / "parts.json").write_text(json.dumps({"k": {"status": "done", "seconds": 1, "why": ""}}))
    assert run_command(report.main, [str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "| op forward | B1 | eager | 8 ms | 7.2 ms to 8.8 ms | 4.00 x | 375 pairs/s, peak 1.0 MB |" in text
    assert "| quality | c | ours | 0.5 mIoU |" in text
    assert "![kernel_bench](kernel_bench.svg)" in text
    assert machine.describe()["versions"]["torch"] in text
    assert (tmp_path / "kernel_bench.svg").stat().st_size < 200_000
    assert (tmp_path / "goals.md").read_text().startswith("# Goals")


def test_a_note_explains_a_goal(tmp_path):
    machine.write_result(tmp_path / "k.json", "kernel_bench", rows("gumbel_assign forward", "B1 64x196 C4"))
    (tmp_path / "notes.json").write_text('{"assign-forward": "Two cores share one cache."}')
    assert "Two cores share one cache." in report.goals_table(tmp_path)


def test_no_such_folder(tmp_path, capsys):
    assert run_command(report.main, [str(tmp_path / "none")]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_the_page_is_written_from_the_kept_results(tmp_path):
    page, kept = tmp_path / "docs.md", tmp_path / "results"
    page.write_text(f"Before\n{report.BEGIN}\nold\n{report.END}\nAfter\n")
    report.write_docs(page, kept)
    assert "Not measured: GPUs" in page.read_text()
    machine.write_result(kept / "some-cpu" / "k.json", "kernel_bench", rows("gumbel_assign forward"))
    report.write_docs(page, kept)
    text = page.read_text()
    assert text.startswith("Before\n")
    assert text.endswith("After\n")
    assert "old" not in text
    assert "## Results: some-cpu" in text
    assert "](../benchmarks/results/some-cpu/kernel_bench.svg)" in text
    assert "Not measured: GPUs" in text
    report.write_docs(page, kept)
    assert page.read_text() == text
    page.write_text("no markers")
    with pytest.raises(report.UserError, match="markers"):
        report.write_docs(page, kept)
