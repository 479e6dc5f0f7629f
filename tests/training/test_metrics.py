"""Means that skip bad steps, a metrics file without a torn line, progress for terminals and log files."""

from __future__ import annotations

import json

import pytest
import torch

from groupvit_fast.console import UserError
from groupvit_fast.training import metrics
from groupvit_fast.training.metrics import Clock, MetricsFile, ProgressLine, RunningMeans

RECORD = {"step": 5, "loss": 1.25, "groups_in_use": 3.5, "images_per_s": 812.3, "bad_steps": 0}


def test_means_leave_bad_steps_out_and_start_anew():
    means = RunningMeans(("loss", "norm"), "cpu")
    good, bad = torch.tensor(0.0), torch.tensor(1.0)
    means.add([torch.tensor(1.0), torch.tensor(10.0)], good)
    means.add([torch.tensor(float("nan")), torch.tensor(float("inf"))], bad)
    means.add([torch.tensor(3.0), torch.tensor(20.0)], good)
    assert means.take() == {"loss": 2.0, "norm": 15.0}
    means.add([torch.tensor(float("nan"))] * 2, bad)
    assert means.take() == {"loss": None, "norm": None}


def test_metrics_file_continues_after_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, resume_from=0)
    for step in (1, 2, 3):
        first.write({"step": step, "loss": 0.123456789, "images_per_s": 1234.5678})
    with open(path, "a") as file:
        file.write("not json\n" + '{"step": 2, "torn')
    MetricsFile(path, resume_from=2).write({"step": 9, "loss": None})
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 9]
    assert records[0] == {"step": 1, "loss": 0.123456789, "images_per_s": 1235.0}


def test_a_full_disk_is_one_line(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", resume_from=0)
    file.path.unlink()
    file.path.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
        file.write({"step": 1})


def test_plain_progress_is_a_line_now_and_then(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    line = ProgressLine(total=100, done=0, quiet=False)
    for step in (5, 10, 15, 100):
        now[0] += 2.0
        line.show(RECORD | {"step": step})
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == "step 5/100: 812 images/s, loss 1.250, 3.5 groups in use, 0:38 left"
    assert [text.split(":")[0] for text in shown] == ["step 5/100", "step 100/100"]


def test_skipped_steps_are_said_and_a_missing_loss_is_a_dash(capsys):
    ProgressLine(total=9, done=0, quiet=False).show(
        RECORD | {"loss": None, "groups_in_use": None, "bad_steps": 4}
    )
    assert "loss -, - groups in use, 4 steps skipped" in capsys.readouterr().err


def test_quiet_says_nothing(capsys):
    line = ProgressLine(total=9, done=0, quiet=True)
    line.show(RECORD)
    line.say("word")
    line.advance()
    line.close()
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_it_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(metrics.sys.stderr, "isatty", lambda: True, raising=False)
    line = ProgressLine(total=9, done=3, quiet=False)
    line.advance()
    line.show(RECORD)
    line.say("a word")
    line.close()
    shown = capsys.readouterr().err
    assert "812 images/s, loss 1.250" in shown
    assert "4/9" in shown
    assert "a word\n" in shown


def test_clock_counts_training_and_waiting_but_not_pauses(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])

    class Batch:
        images = torch.zeros(30, 1)

    def batches():
        while True:
            now[0] += 1.0
            yield Batch()

    clock, source = Clock(), batches()
    clock.next(source)
    now[0] += 2.0
    paused = clock.pause()
    now[0] += 50.0
    clock.proceed(paused)
    assert clock.take() == {"images_per_s": pytest.approx(10.0), "data_wait": pytest.approx(1 / 3)}
