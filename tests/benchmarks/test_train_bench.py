"""The training benchmark: the same loss first, then a table, parts of a step and a JSON file."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from groupvit_fast.console import run_command
from groupvit_fast.model.presets import ImageConfig, ModelConfig, TextConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import train_bench
import train_cases

pytest.importorskip("transformers")

SMALL = ModelConfig(
    image=ImageConfig(image_size=32, patch_size=8, width=32, heads=2, depths=(1, 1), group_tokens=(4,),
                      output_groups=(4,)),
    text=TextConfig(width=32, layers=2, heads=2),
    embed_dim=16,
    projector_hidden=32,
)  # fmt: skip
QUICK = ["--device", "cpu", "--seconds", "0", "--rounds", "2", "--batch-size", "4"]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(train_bench, "matmul_speed", lambda device, dtype: 1e11)
    monkeypatch.setattr(
        train_bench,
        "model_config",
        lambda config: replace(SMALL, multi_label_logit_scale=config.multi_label > 0),
    )


@pytest.mark.parametrize("prompts", [0, 2])
def test_the_baseline_is_checked_and_timed(tmp_path, capsys, prompts):
    path = tmp_path / "bench.json"
    arguments = [*QUICK, "--json", str(path)]
    assert run_command(train_bench.main, [*arguments, "--multi-label", str(prompts)]) == 0
    rows = json.loads(path.read_text())["rows"]
    steps = {row["contender"]: row for row in rows if row["name"] == "training step"}
    assert set(steps) == {"ours", "hugging face"}
    for row in steps.values():
        assert row["items"] == 4
        assert row["peak_bytes"] > 0
        assert row["share_of_matmul"] == pytest.approx(row["flops"] / row["median_s"] / 1e11)
    assert {row["name"] for row in rows if row.get("unit") == "s"} == {
        f"part: {name}"
        for name in (
            "image forward",
            "image backward",
            "text forward",
            "text backward",
            "losses",
            "optimiser",
        )
    }
    assert "pairs/s" in capsys.readouterr().out


def test_with_the_loader_the_same_step_is_timed_without_it_too(tmp_path, monkeypatch):
    """Taking turns, so that a busy machine does not pass for a slow loader."""
    path, taken = tmp_path / "bench.json", []

    def feeds(arguments, config, settings, device, names):
        batch = train_cases.make_batch(settings, config.batch_size, config.multi_label, device)
        return {name: lambda: (time.sleep(0.2), taken.append(1), batch)[-1] for name in names}

    monkeypatch.setattr(train_bench, "feeds", feeds)
    words = [*QUICK, "--data", "--only-ours"]
    assert run_command(train_bench.main, [*words, "--json", str(path)]) == 0
    rows = {row["contender"]: row for row in json.loads(path.read_text())["rows"] if "items" in row}
    assert set(rows) == {"ours", "data ready"}
    assert taken
    assert rows["ours"]["case"].endswith(" with loader")
    assert rows["ours"]["median_s"] > 0.2
    assert rows["data ready"]["ratio"] < 1


def test_a_run_that_is_cut_off_keeps_what_it_had(tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    path = tmp_path / "bench.json"
    words = [*QUICK, "--json", str(path)]
    for part, peaks in (("breakdown", True), ("peak_memory", False)):
        path.unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(train_bench if part == "breakdown" else train_bench.stopwatch, part, stopped)
            with pytest.raises(KeyboardInterrupt):
                train_bench.main(words)
        rows = json.loads(path.read_text())["rows"]
        steps = [row for row in rows if row["name"] == "training step"]
        assert [row["contender"] for row in steps] == ["ours", "hugging face"]
        assert all(("peak_bytes" in row) == peaks for row in steps)


def test_another_model_is_an_error_not_a_number(monkeypatch, capsys):
    plain = train_cases.HuggingFace.__init__

    def spoiled(self, *arguments):
        plain(self, *arguments)
        with torch.no_grad():
            self.model.visual_projection[3].bias.add_(0.5)

    monkeypatch.setattr(train_cases.HuggingFace, "__init__", spoiled)
    assert run_command(train_bench.main, ["--device", "cpu", "--seconds", "0", "--batch-size", "4"]) == 1
    assert "do not compute the same loss" in capsys.readouterr().err


def test_made_up_captions_are_as_long_as_real_ones():
    batch = train_cases.make_batch(SMALL, 64, 3, "cpu")
    lengths = batch.texts.argmax(1) + 1
    captions = lengths[batch.text_index[:, 0]].float()
    assert 10 < captions.mean() < 15
    assert len(batch.text_index[:, 0].unique()) > 60
    assert 7 < lengths[batch.text_index[:, 1:]].float().mean() < 11


def test_needed_arithmetic_counts_every_image_and_every_text():
    one = train_bench.step_flops(SMALL, [5], 1, 0)
    assert train_bench.step_flops(SMALL, [5] * 4, 4, 0) == pytest.approx(4 * one)
