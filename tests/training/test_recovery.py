"""Checkpoints written while training goes on: the right moment, one at a time, errors seen, the best kept."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import PACKAGE
from small_run import CONFIG, Loader, bits, metrics, resumed, trainer

from groupvit_fast.console import UserError
from groupvit_fast.model import load_model
from groupvit_fast.training import checkpoint, recovery
from groupvit_fast.training.distributed import World
from groupvit_fast.training.recovery import BackgroundWork


def steps(folder):
    return [int(path.name[5:]) for path in checkpoint.list_steps(folder / "checkpoints")]


def test_training_goes_on_while_the_disk_is_slow_and_the_checkpoint_is_of_its_moment(tmp_path, monkeypatch):
    plain = trainer(tmp_path / "plain", replace(CONFIG, steps=3))
    plain.fit()
    release, seen = threading.Event(), []
    write = checkpoint.save

    def slow(root, snapshot, **options):
        if snapshot.step == 3:
            assert release.wait(30)
        return write(root, snapshot, **options)

    monkeypatch.setattr(checkpoint, "save", slow)

    def look(batch):
        seen.append(steps(tmp_path / "slow"))
        release.set()

    run = trainer(tmp_path / "slow", replace(CONFIG, steps=6, save_every=3), Loader({5: look}))
    run.fit()
    assert seen == [[]]  # the step after the save began before anything was on the disk
    assert steps(tmp_path / "slow") == [3, 6]
    third = load_model(tmp_path / "slow" / "checkpoints" / "step_00000003").state_dict()
    assert all(torch.equal(value, third[name]) for name, value in plain.model.state_dict().items())


def test_work_is_done_one_at_a_time_and_its_error_comes_back_once():
    work, running, most = BackgroundWork(), [], []

    def job():
        running.append(1)
        most.append(len(running))
        time.sleep(0.05)
        running.pop()

    for _ in range(3):
        work.start(job)
    work.wait()
    assert most == [1, 1, 1]

    def fail():
        raise UserError("full")

    work.start(fail)
    with pytest.raises(UserError, match="full"):
        work.wait()
    work.check()


@pytest.mark.parametrize(("number", "text"), [(errno.ENOSPC, "No space left"), (errno.EROFS, "Read-only")])
def test_a_write_that_fails_stops_the_run_at_the_next_step_in_one_line(tmp_path, monkeypatch, number, text):
    run = trainer(tmp_path, replace(CONFIG, steps=500, save_every=5, log_every=500))
    write = checkpoint.save

    def full(handle):
        raise OSError(number, os.strerror(number))

    def save(root, snapshot, **options):
        if snapshot.step == 10:
            monkeypatch.setattr(os, "fsync", full)
        return write(root, snapshot, **options)

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(UserError, match=rf"step 10 in .*{text}.*the one of step 5 is intact"):
        run.fit()
    assert 10 <= run.step < 100
    monkeypatch.undo()
    assert steps(tmp_path) == [5]
    assert resumed(tmp_path).step == 5


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with room for a few checkpoints."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small file system can not be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(small_disk):
    """One line, the checkpoints before are whole; with room again the run goes on from the last."""
    config = replace(CONFIG, steps=60, save_every=2, keep_checkpoints=1)
    fill = small_disk / "other"

    def grow(batch):
        free = os.statvfs(small_disk)
        fill.write_bytes(b"x" * max(free.f_bavail * free.f_bsize - 20_000, 0))

    run = trainer(small_disk / "run", config, Loader({8: grow}))
    with pytest.raises(
        UserError, match=r"cannot save the checkpoint of step \d+ in .*No space left on device; the one"
    ):
        run.fit()
    found = checkpoint.find(small_disk / "run", pytest.fail)
    fill.unlink()
    again = resumed(small_disk / "run", config=replace(config, steps=12))
    assert again.recovery.checkpoint == found
    again.fit()
    assert steps(small_disk / "run") == [12]


def test_the_best_evaluation_is_kept_and_marked(tmp_path):
    scores = iter([0.9, 0.2, 0.5, 0.3, 0.1])
    config = replace(CONFIG, eval_every=3, save_every=2, keep_checkpoints=1)
    run = trainer(tmp_path, config, evaluate=lambda model: {"miou": next(scores)})
    run.fit()
    assert {step: result["miou"] for step, result in run.evaluations.items()} == {
        0: 0.9, 3: 0.2, 6: 0.5, 9: 0.3, 12: 0.1,
    }  # fmt: skip
    assert steps(tmp_path) == [6, 12]
    best = tmp_path / "checkpoints" / "best"
    assert os.readlink(best) == "step_00000006"
    assert load_model(best).config == run.model.config


def test_a_signal_during_an_evaluation_ends_it_and_it_is_done_after_resuming(tmp_path):
    whole = trainer(tmp_path / "whole", replace(CONFIG, eval_every=4), evaluate=lambda model: {"miou": 0.5})
    whole.fit()
    calls = []

    def evaluate(model):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)
        return {"miou": 0.5}

    config = replace(CONFIG, eval_every=4)
    run = trainer(tmp_path / "parts", config, evaluate=evaluate)
    begun = time.monotonic()
    assert run.fit() == signal.SIGTERM
    assert time.monotonic() - begun < 10
    assert run.step == 4
    assert run.model.training
    assert sorted(run.evaluations) == [0]
    last = resumed(tmp_path / "parts", config=config, evaluate=evaluate)
    assert last.fit() is None
    assert last.evaluations == whole.evaluations
    assert bits(last) == bits(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_waiting_for_data_or_saving(tmp_path, monkeypatch, number):
    whole = trainer(tmp_path / "whole")
    whole.fit()

    def asked(batch):
        os.kill(os.getpid(), number)
        time.sleep(0.05)

    waiting = trainer(tmp_path / "data", loader=Loader({4: asked}))
    assert waiting.fit() == number
    write = checkpoint.save

    def saving(*arguments, **options):
        os.kill(os.getpid(), number)
        return write(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", saving)
        assert trainer(tmp_path / "save").fit() == number
    for name in ("data", "save"):
        last = resumed(tmp_path / name)
        assert last.fit() is None
        assert bits(last) == bits(whole)
        assert metrics(tmp_path / name) == metrics(tmp_path / "whole")


WAITING = """
import sys, time
from dataclasses import replace
from pathlib import Path
from small_run import CONFIG, Loader, trainer

def wait(batch):
    print("waiting", flush=True)
    time.sleep(100)

trainer(Path(sys.argv[1]), CONFIG, Loader({8: wait})).fit()
"""


def test_a_second_signal_ends_the_program_at_once(tmp_path):
    """Also where the first can not be heard for long; the last checkpoint is there to continue from."""
    whole = trainer(tmp_path / "whole")
    whole.fit()
    paths = [PACKAGE, str(Path(__file__).parent)]
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, str(tmp_path / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline() == "stopping (again: at once)\n"
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM
    last = resumed(tmp_path / "run")
    assert last.step == 6
    last.fit()
    assert bits(last) == bits(whole)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_another_number_of_processes_continues_weights_optimiser_and_data(tmp_path):
    run = trainer(tmp_path, replace(CONFIG, steps=6))
    run.fit()
    said = []
    again = trainer(tmp_path)
    again.world = World(0, 2, 0)
    again.recovery.resume(checkpoint.find(tmp_path, said.append), said.append)
    assert bits(again) == bits(run)
    assert again.loader.position == 6
    assert len(said) == 1
    assert "was saved by 1 processes, this run has 2" in said[0]
    assert "noise and drop path are per process" in said[0]


def test_bad_samples_of_all_processes_are_left_out_afterwards():
    states = [{"position": 96, "quarantined": [7, 3]}, {"position": 96, "quarantined": [5, 7]}]
    assert recovery.merged(states) == {"position": 96, "quarantined": [3, 5, 7]}
    assert recovery.merged([{"position": 4}] * 2) == {"position": 4}


def test_a_clock_that_jumps_back_changes_nothing(tmp_path, monkeypatch):
    """Neither names nor order of checkpoints depend on the time of day."""
    whole = trainer(tmp_path / "whole")
    whole.fit()
    now = iter(range(10**9, 0, -(10**5)))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    run = trainer(tmp_path / "jump")
    run.fit()
    for folder in reversed(checkpoint.list_steps(tmp_path / "jump" / "checkpoints")):
        os.utime(folder, (1e9, 1e9 - int(folder.name[5:])))
    assert checkpoint.find(tmp_path / "jump", print).name == "step_00000012"
    assert bits(run) == bits(whole)
    assert metrics(tmp_path / "jump") == metrics(tmp_path / "whole")
