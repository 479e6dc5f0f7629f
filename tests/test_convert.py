"""The convert command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from groupvit_fast import convert
from groupvit_fast.console import run_command
from groupvit_fast.model import ImageConfig, ModelConfig, TextConfig, create_model


@pytest.fixture
def ours(tmp_path):
    image = ImageConfig(
        image_size=32,
        patch_size=8,
        width=64,
        heads=1,
        depths=(1, 1, 1),
        group_tokens=(4, 3),
        output_groups=(4, 2),
    )
    text = TextConfig(context_length=8, vocab_size=50, width=64, layers=1, heads=1)
    model = create_model(ModelConfig(image, text, embed_dim=8, projector_hidden=12), seed=0)
    model.save_pretrained(tmp_path / "ours", about={"data": "nothing"})
    return tmp_path / "ours"


def run(*arguments):
    return run_command(convert.main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("way", [("hf",), ("official",), ("hf", "official"), ("official", "hf")])
def test_round_trip_gives_the_same_bytes(ours, tmp_path, way):
    place = ours
    for layout in way:
        target = tmp_path / (layout + (".pth" if layout == "official" else ""))
        assert run(place, target, "--to", layout) == 0
        place = target
    assert run(place, tmp_path / "back") == 0
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "back" / name).read_bytes() == (ours / name).read_bytes()


def test_says_what_it_did(ours, tmp_path, capsys):
    assert run(ours, tmp_path / "hf", "--to", "hf", "--json", tmp_path / "done.json") == 0
    assert "(ours) -> " in capsys.readouterr().out
    done = json.loads((tmp_path / "done.json").read_text())
    assert (done["from"], done["to"], done["missing"]) == ("ours", "hf", [])
    assert done["numbers"] > 10_000


def test_existing_target_is_kept_unless_forced(ours, tmp_path, capsys):
    (tmp_path / "file.pth").write_text("precious")
    assert run(ours, tmp_path / "file.pth", "--to", "official") == 1
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "file.pth").read_text() == "precious"
    assert run(ours, tmp_path / "file.pth", "--to", "official", "--force") == 0
    assert torch.load(tmp_path / "file.pth", weights_only=True)["model"]


def test_partial(ours, tmp_path, capsys):
    assert run(ours, tmp_path / "whole.pth", "--to", "official") == 0
    payload = torch.load(tmp_path / "whole.pth", weights_only=True)
    del payload["model"]["img_encoder.norm.bias"]
    torch.save(payload, tmp_path / "lacking.pth")
    assert run(tmp_path / "lacking.pth", tmp_path / "out") == 1
    assert "1 missing (img_encoder.norm.bias)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(tmp_path / "lacking.pth", tmp_path / "out", "--partial") == 0
    assert "accepted: 1 missing (img_encoder.norm.bias)" in capsys.readouterr().err


class RunsCode:
    def __reduce__(self):
        return os.system, ("echo owned > owned.txt",)


def test_malicious_file_is_refused_in_one_line(tmp_path):
    torch.save({"model": {"weight": torch.ones(1)}, "config": RunsCode()}, tmp_path / "evil.pth")
    done = subprocess.run(
        [sys.executable, "-m", "groupvit_fast.convert", "evil.pth", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(convert.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: evil.pth: refused: it asks to run posix.system")
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["evil.pth"]


def test_missing_source_and_forbidden_target(ours, tmp_path, capsys):
    assert run(tmp_path / "nowhere", tmp_path / "out") == 1
    assert "nowhere: does not exist" in capsys.readouterr().err
    (tmp_path / "blocked").write_text("")
    assert run(ours, tmp_path / "blocked" / "out") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "blocked" in error


def test_help_explains_the_layouts(capsys):
    with pytest.raises(SystemExit, match="0"):
        convert.main(["--help"])
    text = capsys.readouterr().out
    assert all(word in text for word in ("official", "Hugging Face", "training run", "examples:"))
