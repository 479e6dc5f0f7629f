"""A checkpoint is complete or invisible, whatever breaks while it is written."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
from pathlib import Path

import pytest
import torch

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


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "trainer.pt", "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "missing"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(run, name, damage):
    older, newer = save(run / "checkpoints", 100), save(run / "checkpoints", 200)
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


def test_nothing_to_find(tmp_path):
    assert find(tmp_path / "absent") == (None, [])
    assert find(tmp_path) == (None, [])


class Crash(BaseException):
    """The process dies here."""


def crash_at(monkeypatch, number):
    """Let the `number`-th call that changes the disk fail; returns how many calls there were."""
    calls = [0]

    def guard(function):
        def guarded(*arguments, **options):
            calls[0] += 1
            if calls[0] == number:
                raise Crash
            return function(*arguments, **options)

        return guarded

    for name in ("fsync", "replace", "rename", "mkdir", "fdopen"):
        monkeypatch.setattr(os, name, guard(getattr(os, name)))
    return calls


def test_a_crash_at_any_system_call_leaves_a_usable_checkpoint(tmp_path, monkeypatch):
    number, completed = 0, False
    while not completed:
        number += 1
        run = tmp_path / str(number)
        older = save(run / "checkpoints", 100)
        with monkeypatch.context() as patch:
            crash_at(patch, number)
            try:
                save(run / "checkpoints", 200, keep=1)
                completed = True
            except Crash:
                pass
        found, warnings = find(run)
        assert found in (older, run / "checkpoints" / "step_00000200")
        assert warnings == []
        save(run / "checkpoints", 300, keep=1)
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000300"]
    assert number > 15


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
