"""The built-in dataset appears complete, once, or not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from groupvit_fast.console import UserError
from groupvit_fast.data import shapes
from groupvit_fast.training.distributed import World
from groupvit_fast.training.recipes import tiny
from groupvit_fast.training.sources import shapes_folder


@pytest.fixture
def config(tmp_path):
    return replace(tiny(), data_root=tmp_path / "cache", shapes_train=4, shapes_val=2)


@pytest.fixture
def calls(monkeypatch):
    """Replace the drawing by something quick that can fail half-way."""
    calls = []

    def write(root, *, train_samples, val_samples, seed):
        calls.append((train_samples, val_samples, seed))
        (root / "train").mkdir()
        if seed == 13:
            raise OSError(28, "No space left on device")
        if seed == 14:
            raise KeyboardInterrupt
        (root / "voc").mkdir()

    monkeypatch.setattr(shapes, "write_shapes", write)
    return calls


def test_drawn_once_and_found_again(config, calls, capsys):
    first = shapes_folder(config, World())
    assert shapes_folder(config, World()) == first
    assert calls == [(4, 2, 0)]
    assert {path.name for path in first.iterdir()} == {"train", "voc"}
    assert [path.name for path in (config.data_root).iterdir()] == [first.name]
    assert capsys.readouterr().err.count("drawing") == 1


def test_each_choice_of_options_has_its_own_folder(config, calls):
    changed = [
        config,
        replace(config, shapes_seed=1),
        replace(config, shapes_train=5),
        replace(config, shapes_val=3),
    ]
    assert len({shapes_folder(one, World()) for one in changed}) == len(calls) == 4


def test_changed_drawing_code_draws_anew(config, calls, monkeypatch, tmp_path):
    first = shapes_folder(config, World())
    (tmp_path / "shapes.py").write_text("# other code")
    monkeypatch.setattr(shapes, "__file__", str(tmp_path / "shapes.py"))
    assert shapes_folder(config, World()) != first


@pytest.mark.parametrize(("seed", "error"), [(13, UserError), (14, KeyboardInterrupt)])
def test_a_failure_half_way_leaves_nothing(config, calls, seed, error):
    with pytest.raises(
        error, match="No space left on device; name a writable folder" if error is UserError else None
    ):
        shapes_folder(replace(config, shapes_seed=seed), World())
    assert list(config.data_root.iterdir()) == []


def test_two_runs_at_once_agree(config, monkeypatch):
    """The other run finishes while ours still draws."""
    drawing, others = [], []

    def write(root, **_):
        drawing.append(root)
        (root / "file").write_text("")
        if len(drawing) == 1:
            others.append(shapes_folder(replace(config, quiet=True), World()))

    monkeypatch.setattr(shapes, "write_shapes", write)
    assert shapes_folder(config, World()) == others[0]
    assert len(drawing) == 2
    assert [path.name for path in config.data_root.iterdir()] == [others[0].name]


def test_only_the_first_process_of_a_machine_draws(config, calls):
    folder = shapes_folder(config, World(rank=3, size=4, local_rank=3))
    assert calls == []
    assert not folder.exists()


def test_by_default_it_is_kept_in_the_cache_of_the_user(config, calls, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    folder = shapes_folder(replace(config, data_root=None), World())
    assert folder.parent == tmp_path / "xdg" / "groupvit_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert (
        shapes_folder(replace(config, data_root=None), World()).parent
        == tmp_path / "home/.cache/groupvit_fast"
    )


def test_a_file_in_the_way_is_one_line(config, calls):
    config.data_root.write_text("")
    with pytest.raises(UserError, match="cannot write the shapes dataset"):
        shapes_folder(config, World())
