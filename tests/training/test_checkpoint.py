"""A checkpoint is complete or invisible, whatever breaks while it is written."""

from __future__ import annotations

import errno
import io
import os
import pickle
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from groupvit_fast import console
from groupvit_fast.console import UserError
from groupvit_fast.model import load_model
from groupvit_fast.model.groupvit import create_model
from groupvit_fast.model.presets import ImageConfig, ModelConfig, TextConfig
from groupvit_fast.training import checkpoint

IMAGE = ImageConfig(image_size=16, patch_size=8, width=8, heads=2, depths=(1, 0), group_tokens=(2,),
                    output_groups=(2,))  # fmt: skip
TEXT = TextConfig(context_length=8, vocab_size=32, width=8, layers=1, heads=2)
MODEL = ModelConfig(image=IMAGE, text=TEXT, embed_dim=8, projector_layers=1)
STATE = {"step": 1, "moments": torch.arange(5.0), "loader": [{"position": 3, "random": b"\x00\xff"}]}


def save(root, step, *, seed=0, keep=9, best=None, ema=False):
    weights = create_model(MODEL, seed=seed).state_dict()
    averaged = {name: value + 1 for name, value in weights.items()} if ema else None
    snapshot = checkpoint.Snapshot(step, MODEL, weights, STATE, {"step": step}, averaged)
    return checkpoint.save(root, snapshot, keep=keep, best=best)


def find(run):
    warnings = []
    return checkpoint.find(run, warnings.append), warnings


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def steps(run):
    return [path.name for path in checkpoint.list_steps(run / "checkpoints")]


def test_round_trip(run):
    folder = save(run / "checkpoints", 7, seed=4)
    model = create_model(MODEL, seed=5)
    checkpoint.load_weights(folder, model)
    for name, value in create_model(MODEL, seed=4).state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    state = checkpoint.load_state(folder)
    assert torch.equal(state.pop("moments"), STATE["moments"])
    assert state == {name: value for name, value in STATE.items() if name != "moments"}
    assert find(run) == (folder, [])
    assert find(folder) == (folder, [])
    assert load_model(run).config == MODEL


def test_sums_are_those_of_the_usual_tool(run):
    folder = save(run / "checkpoints", 7)
    subprocess.run(["sha256sum", "--strict", "--quiet", "-c", "SHA256SUMS"], cwd=folder, check=True)


def test_keeps_the_newest_and_drops_a_future_that_was_left(run):
    for step in (100, 200, 300, 400):
        save(run / "checkpoints", step, keep=3)
    assert steps(run) == ["step_00000200", "step_00000300", "step_00000400"]
    save(run / "checkpoints", 250, keep=3)
    assert steps(run) == ["step_00000200", "step_00000250"]
    save(run / "checkpoints", 250, seed=1, keep=1)
    assert steps(run) == ["step_00000250"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000250"]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "trainer.pt", "SHA256SUMS", "ema/model.safetensors"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "missing"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(run, name, damage):
    older, newer = save(run / "checkpoints", 100), save(run / "checkpoints", 200, ema=True)
    path = newer / name
    content = path.read_bytes()
    middle = len(content) // 2
    if damage == "missing":
        path.unlink()
    else:
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"flip": flipped, "cut": content[:middle], "empty": b""}[damage])
    found, warnings = find(run)
    assert found == older
    assert len(warnings) == 1
    assert str(newer) in warnings[0]
    with pytest.raises(UserError, match="is damaged"):
        find(newer)


def test_the_best_one_stays_and_the_link_leads_to_it(run):
    for step in (100, 200, 300, 400):
        save(run / "checkpoints", step, keep=1, best=200 if step >= 200 else None)
        checkpoint.mark_best(run / "checkpoints", min(step, 200))
    assert steps(run) == ["step_00000200", "step_00000400"]
    assert load_model(run / "checkpoints" / "best").config == MODEL
    assert find(run)[0].name == "step_00000400"


def test_a_flipped_byte_anywhere_is_noticed(run):
    """100 places spread over all files of the newest checkpoint."""
    older, newer = save(run / "checkpoints", 100), save(run / "checkpoints", 200, ema=True)
    files = sorted(path for path in newer.rglob("*") if path.is_file())
    draw = random.Random(1)
    for number in range(100):
        path = files[number % len(files)]
        content = path.read_bytes()
        place = draw.randrange(len(content))
        path.write_bytes(
            content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]
        )
        assert find(run)[0] == older, (path, place)
        path.write_bytes(content)
    assert find(run) == (newer, [])


def test_nothing_to_find(tmp_path):
    assert find(tmp_path / "absent") == (None, [])
    assert find(tmp_path) == (None, [])


class Crash(BaseException):
    """The process dies here."""


PIECES = 2


class Unbuffered:
    """A file whose every write goes to the disk at once, in pieces, each of them a chance to fail."""

    def __init__(self, file, fail):
        self.file, self.fail = file, fail

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        size = max(1, -(-len(data) // PIECES))
        for start in range(0, len(data), size):
            self.fail("write", lambda piece=data[start : start + size // 2]: self.file.write(piece))
            self.file.write(data[start : start + size])

    def flush(self):
        self.file.flush()

    def fileno(self):
        return self.file.fileno()


def fail_at(monkeypatch, number, error):
    """Let the `number`-th call that changes the disk fail, a write after half of it; returns the count."""
    calls = [0]

    def fail(name, half_done=lambda: None):
        calls[0] += 1
        if calls[0] == number:
            half_done()
            raise error

    def guard(name, function):
        def guarded(*arguments, **options):
            fail(name)
            return function(*arguments, **options)

        return guarded

    for name in ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "symlink"):
        monkeypatch.setattr(os, name, guard(name, getattr(os, name)))
    monkeypatch.setattr(console, "open", lambda *a: Unbuffered(io.FileIO(a[0], "x"), fail), raising=False)
    return calls


FAULTS = [Crash(), OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "Input/output error")]


@pytest.mark.parametrize(
    "fault",
    [FAULTS[0], *(pytest.param(fault, marks=pytest.mark.slow) for fault in FAULTS[1:])],
    ids=["crash", "full", "broken"],
)
def test_whatever_fails_wherever_a_usable_checkpoint_is_left(tmp_path, monkeypatch, fault):
    """Each call in turn: the newest or the one before it loads, and the next save cleans up."""
    number, completed = 0, False
    first = save(tmp_path / "first", 100, ema=True)
    while not completed:
        number += 1
        run = tmp_path / str(number)
        older = run / "checkpoints" / first.name
        shutil.copytree(first, older)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda handle: None)  # the slow part; guarded all the same
            calls = fail_at(patch, number, fault)
            try:
                save(run / "checkpoints", 200, keep=1, ema=True)
                checkpoint.mark_best(run / "checkpoints", 200)
                completed = calls[0] < number
            except (Crash, UserError, OSError):
                pass
        found, warnings = find(run)
        assert found in (older, run / "checkpoints" / "step_00000200")
        assert warnings == []
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda handle: None)
            save(run / "checkpoints", 300, keep=1)
        names = {path.name for path in (run / "checkpoints").iterdir()}
        assert names - {"best", ".best-link"} == {"step_00000300"}
        shutil.rmtree(run)
    assert number > 40


def test_a_full_disk_is_one_line_and_the_earlier_checkpoint_stays(run, monkeypatch):
    older = save(run / "checkpoints", 100)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            UserError, match=r"step 200 in .*No space left on device; the one of step 100 is intact"
        ):
            save(run / "checkpoints", 200)
        with pytest.raises(UserError, match="there is no earlier one"):
            save(run / "other", 200)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000100"]
    assert find(run) == (older, [])


def test_a_folder_that_can_not_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Not a directory"):
        save(tmp_path / "file" / "checkpoints", 1)


def test_another_model_is_refused_by_name(run):
    folder = save(run / "checkpoints", 1)
    other = ModelConfig(image=ImageConfig(**{**IMAGE.__dict__, "tau": 0.5}), text=TEXT, embed_dim=4,
                        projector_layers=1)  # fmt: skip
    with pytest.raises(
        UserError, match=r"its image\.tau is 1\.0, here it is 0\.5 and 1 more settings? differ"
    ):
        checkpoint.load_weights(folder, create_model(other, seed=0))


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/groupvit-fast-was-here",)


def test_no_code_in_a_trainer_state_is_run(run, tmp_path):
    folder = save(run / "checkpoints", 1)
    (folder / "trainer.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(UserError, match=r"trainer\.pt is not a trainer state"):
        checkpoint.load_state(folder)
    assert not Path("/tmp/groupvit-fast-was-here").exists()
    (folder / "trainer.pt").unlink()
    with pytest.raises(UserError, match=r"no trainer\.pt"):
        checkpoint.load_state(folder)
