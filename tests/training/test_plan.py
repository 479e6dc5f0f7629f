"""The plan of a run that is not started."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

from groupvit_fast import train
from groupvit_fast.console import UserError, run_command
from groupvit_fast.model.groupvit import create_model
from groupvit_fast.training import plan
from groupvit_fast.training.recipes import model_config, recipe

OFFICIAL = replace(
    recipe("groupvit-gcc-yfcc"), world_size=1024, batch_size=4, epochs=None, train_samples=10**6
)
RESULT = {
    "machine": {"slug": "some-gpu"},
    "rows": [
        {"name": "training step", "contender": "hugging face", "case": "c", "items": 8, "median_s": 1.0},
        {"name": "training step", "contender": "ours", "case": "c", "items": 8, "median_s": 0.5},
        {"name": "part: losses", "contender": "ours", "case": "c", "value": 0.1, "unit": "s"},
    ],
}


def test_numbers_of_a_thousand_processes(tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(RESULT))
    made = plan.make_plan(replace(OFFICIAL, measured=path))
    parameters = sum(p.numel() for p in create_model(model_config(OFFICIAL)).parameters())
    assert (made.global_batch, made.steps, made.parameters) == (4096, 245, parameters)
    assert made.state_bytes == 16 * parameters
    assert made.gradient_traffic == pytest.approx(8 * parameters, rel=0.002)
    assert made.embedding_traffic == 2 * 1023 * 4 * 5 * 256 * 4
    assert made.flops_a_step == pytest.approx(4 * 25.9e9, rel=0.03)
    assert made.pairs_per_s == 16 * 1024
    shown = plan.text(made, OFFICIAL)
    assert "at most 16384 pairs/s: 16.0 of one device (c, ours, some-gpu) x 1024" in shown


def test_sharding_divides_what_is_kept_and_sends_weights_too():
    copied = plan.make_plan(replace(OFFICIAL, world_size=8))
    sharded = plan.make_plan(replace(OFFICIAL, world_size=8, fsdp=True))
    assert sharded.state_bytes == pytest.approx(copied.state_bytes / 8, rel=0.001)
    assert sharded.gradient_traffic == pytest.approx(copied.gradient_traffic / 2, rel=0.001)
    # forward and backward for all but projectors, patch embedding, norms and the like
    assert 1.8 * sharded.gradient_traffic < sharded.weight_traffic < 2 * sharded.gradient_traffic
    assert sharded.memory_bytes < copied.memory_bytes
    assert plan.make_plan(replace(OFFICIAL, world_size=1, fsdp=True)).gathered_bytes == 0
    shown = plan.text(sharded, OFFICIAL)
    assert re.search(r"weights, gradients, moments; 0\.\d\d of them gathered at a time; ", shown)
    assert re.search(r"network +\d+ MB of weights, \d+ MB of gradients and \d+ MB of embeddings", shown)
    assert "gathered" not in plan.text(copied, OFFICIAL)


def test_memory_follows_batch_frozen_parts_and_checkpointing():
    tiny = replace(recipe("tiny"), batch_size=8)
    base = plan.make_plan(tiny)
    assert plan.make_plan(replace(tiny, batch_size=16)).activation_bytes == 2 * base.activation_bytes
    assert plan.make_plan(replace(tiny, freeze=["text_encoder"])).state_bytes < base.state_bytes
    less = plan.make_plan(replace(tiny, grad_checkpointing=["all"]))
    assert less.activation_bytes < 0.7 * base.activation_bytes
    accumulated = plan.make_plan(replace(tiny, accum_freq=4))
    assert accumulated.activation_bytes == base.activation_bytes
    assert accumulated.global_batch == 4 * base.global_batch


def test_kept_bytes_are_those_of_a_real_step():
    config = replace(recipe("tiny"), multi_label=1)
    settings = model_config(config)
    model = create_model(settings, seed=0)
    found = plan.kept_bytes_per_image(model, settings, 1)
    size = 64 + settings.image.group_tokens[0]
    layer = 4 * size * settings.image.width  # bytes of one [N,C] of one image
    assert 20 * layer < found < 80 * layer
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_the_command_prints_it_and_starts_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    assert run_command(train.main, ["--dry-run", "--world-size", "16", "--batch-size", "4"]) == 0
    out = capsys.readouterr().out
    assert "global batch   64 pairs: 4 x 1 batches a step x 16" in out
    assert re.search(r"network +\d+ MB of gradients", out)
    assert "unknown: give --measured" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), ("{}", "is not a result of"), ("x", "is not")]
)
def test_a_wrong_measurement_is_one_line(tmp_path, content, message):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        plan.make_plan(replace(recipe("tiny"), measured=path))
