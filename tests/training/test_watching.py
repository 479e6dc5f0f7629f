"""What a run shows and keeps besides its weights: groups, averages, profiles, trackers, pictures, lengths."""

from __future__ import annotations

import copy
import json
import math
import sys
import types
from dataclasses import replace

import pytest
import torch
from PIL import Image
from small_run import CONFIG, MODEL, Loader, bits, metrics, nan_pixels, resumed, trainer

from groupvit_fast.console import UserError
from groupvit_fast.model import load_model
from groupvit_fast.model.groupvit import create_model
from groupvit_fast.training import optim, seeds, trackers
from groupvit_fast.training.ema import WeightAverage
from groupvit_fast.training.metrics import group_statistics
from groupvit_fast.training.profiling import step_range


def test_statistics_of_groups():
    areas = torch.tensor([[4.0, 4, 4, 4], [16, 0, 0, 0]])
    in_use, entropy, largest = (value.item() for value in group_statistics(areas))
    assert (in_use, largest) == (2.5, 0.625)
    assert entropy == pytest.approx(0.5)
    uneven = torch.tensor([[1.0, 3.0]])
    expected = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2)
    assert group_statistics(uneven)[1].item() == pytest.approx(expected)


def test_every_line_has_what_is_watched(tmp_path):
    run = trainer(tmp_path)
    run.loader.bad_samples = 3
    run.fit()
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["bad_samples"] == 3
    assert 0 <= record["group_entropy"] <= 1
    assert 1 / 3 <= record["largest_group"] <= 1
    assert record["multi_label_logit_scale"] > 0
    assert record["tflops"] > 0
    assert 0 < record["mfu"] < 2
    assert 0.05 < record["memory_gb"] < 100


def test_averaged_weights_follow_skip_bad_steps_and_resume_exactly(tmp_path):
    """Against the formula by hand; a skipped step leaves them; a resumed run has the same bits."""
    config = replace(CONFIG, model_ema=True, model_ema_decay=0.5)
    model = create_model(MODEL, seed=3)
    average, expected = WeightAverage(model, 0.5), copy.deepcopy(model)
    for step, bad in enumerate((0.0, 1.0, 0.0)):
        with torch.no_grad():
            for value in model.parameters():
                value.add_(1.0)
            decay = min(0.5, (1 + step) / (10 + step))
            for old, new in zip(expected.parameters(), model.parameters(), strict=True):
                old.copy_(old if bad else decay * old + (1 - decay) * new)
        average.update(model, torch.tensor(bad), step)
    for mine, theirs in zip(average.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)

    spoil = {4: nan_pixels}
    whole = trainer(tmp_path / "whole", config, Loader(spoil))
    whole.fit()

    def die(batch):
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        trainer(tmp_path / "parts", config, Loader(spoil | {9: die})).fit()
    last = resumed(tmp_path / "parts", config=config, loader=Loader(spoil))
    last.fit()
    pairs = zip(whole.ema.model.state_dict().values(), last.ema.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert bits(last) == bits(whole)
    saved = load_model(tmp_path / "parts" / "checkpoints" / "step_00000012" / "ema")
    assert torch.equal(saved.logit_scale, last.ema.model.logit_scale)
    assert not torch.equal(saved.logit_scale, last.model.logit_scale)


def test_averaged_weights_are_evaluated_too(tmp_path):
    seen = []
    run = trainer(
        tmp_path,
        replace(CONFIG, model_ema=True),
        evaluate=lambda model: (seen.append(model), {"miou": len(seen)})[1],
    )
    run.fit()
    assert seen == [run.model, run.ema.model] * 2
    assert run.evaluations == {0: {"miou": 1, "ema": {"miou": 2}}, 12: {"miou": 3, "ema": {"miou": 4}}}
    plain = trainer(tmp_path / "plain")
    plain.fit()
    assert bits(plain) == bits(run)


def test_a_picture_at_each_evaluation(tmp_path):
    def picture(model, path):
        Image.new("RGB", (4, 4)).save(path)

    run = trainer(
        tmp_path, replace(CONFIG, eval_every=6), evaluate=lambda model: {"miou": 0.1}, picture=picture
    )
    run.fit()
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["step_00000000.png", "step_00000006.png", "step_00000012.png"]


def test_some_steps_are_profiled(tmp_path, capfd):
    run = trainer(tmp_path, replace(CONFIG, profile_steps="3:5", quiet=False))
    run.fit()
    trace = json.loads((tmp_path / "profile" / "trace_rank_0.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"step 3", "step 4"} <= names
    assert not {"step 2", "step 5"} & names
    assert "aten::" in (tmp_path / "profile" / "operators_rank_0.txt").read_text()
    assert "profile of steps 3 to 4" in capfd.readouterr().err
    plain = trainer(tmp_path / "plain")
    plain.fit()
    assert bits(plain) == bits(run)


@pytest.mark.parametrize("text", ["5", "5:5", "7:5", "a:b", "-1:3", "1:2:3"])
def test_a_range_of_steps_that_is_none(text):
    with pytest.raises(UserError, match="expected FIRST:END"):
        step_range(text)


def test_tensorboard_gets_numbers_and_pictures(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trainer(
        tmp_path, replace(CONFIG, report_to="tensorboard"), evaluate=lambda model: {"miou": 0.25},
        picture=lambda model, path: Image.new("RGB", (4, 4)).save(path),
    )  # fmt: skip
    run.fit()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [4, 8, 12]
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses)
    assert [event.value for event in events.Scalars("evaluation/miou")] == [0.25, 0.25]
    assert [event.step for event in events.Images("evaluation/groups")] == [0, 12]


def test_wandb_gets_the_same_and_continues_its_run(tmp_path, monkeypatch):
    """With a stand-in that has the three calls we use."""
    logged, begun, finished = [], [], []
    run = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: finished.append(1)
    )
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: (begun.append(options), run)[1]
    fake.Image = lambda path: f"image {path}"
    monkeypatch.setitem(sys.modules, "wandb", fake)
    trainer(tmp_path, replace(CONFIG, report_to="wandb"), evaluate=lambda model: {"miou": 0.25}).fit()
    assert [step for step, values in logged if "train/loss" in values] == [4, 8, 12]
    assert [step for step, values in logged if values.get("evaluation/miou") == 0.25] == [0, 12]
    assert begun[0]["id"] == tmp_path.name
    assert begun[0]["resume"] == "allow"
    assert begun[0]["config"]["lr"] == 1e-2
    assert finished == [1]


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_an_absent_tracker_is_one_line(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"--report-to {name}: not installed; pip install {name}"):
        trackers.Trackers(name, tmp_path, {}, 0)
    with pytest.raises(UserError, match="not one of tensorboard, wandb"):
        trackers.check_names("tensorbord")


def test_layers_below_learn_more_slowly():
    model = create_model(MODEL)
    above = optim.layers_above(model)
    assert above["image_encoder.patch_embedding.position"] == 4
    assert above["image_encoder.stages.0.blocks.0.norm1.weight"] == 3
    assert above["image_encoder.stages.0.blocks.1.norm1.weight"] == 2
    assert above["image_encoder.stages.1.blocks.0.norm1.weight"] == 1
    assert above["text_encoder.token_embedding.weight"] == 2
    assert above["logit_scale"] == above["image_projector.out.weight"] == 0
    groups = optim.parameter_groups(model, 0.1, 0.5)
    rates = {id(p): group["rate_factor"] for group in groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == 0.5 ** above[name]


def test_the_rate_of_a_layer_reaches_its_update(tmp_path):
    run = trainer(tmp_path, replace(CONFIG, layer_decay=0.5, steps=2))
    run.fit()
    rates = {group["rate_factor"]: group["lr"] for group in run.optimizer.adamw.param_groups}
    assert rates[0.125] == pytest.approx(rates[1.0] / 8)


def test_frozen_parameters_stay(tmp_path):
    run = trainer(tmp_path, replace(CONFIG, freeze=["text_encoder", "image_encoder.patch"]))
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    run.fit()
    for name, value in run.model.named_parameters():
        frozen = name.startswith(("text_encoder", "image_encoder.patch"))
        assert torch.equal(value, before[name]) == frozen, name
    with pytest.raises(
        UserError, match=r"--freeze texts: no parameter .*\(parts: image_encoder, text_encoder"
    ):
        optim.freeze(create_model(MODEL), ["texts"])
    with pytest.raises(UserError, match="nothing to train"):
        optim.freeze(create_model(MODEL), [""])


def test_length_in_pairs():
    config = replace(CONFIG, steps=None, train_samples=100)
    assert optim.number_of_steps(config, 5, 1) == 17
    assert optim.number_of_steps(config, 5, 4) == 5
    assert optim.number_of_steps(replace(config, train_samples=None, epochs=2.0), 5, 4) == 10


def test_saving_by_the_clock(tmp_path):
    config = replace(CONFIG, save_every=1000, save_every_minutes=1e-9, log_every=3, keep_checkpoints=9)
    trainer(tmp_path, config).fit()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step_{step:08d}" for step in (3, 6, 9, 12)]


def test_spread_over_seeds():
    results = {
        seed: {"training": {"loss": loss, "groups_in_use": None}, "miou": loss / 10, "oracle_miou": 0.5}
        for seed, loss in ((4, 1.0), (5, 2.0), (6, 3.0))
    }
    summary = seeds.seed_summary(results)
    assert summary["seeds"] == [4, 5, 6]
    assert summary["loss"] == {"mean": 2.0, "std": 1.0, "min": 1.0, "max": 3.0}
    assert summary["miou"]["std"] == pytest.approx(0.1)
    assert "groups_in_use" not in summary
    assert "3 seeds" in seeds.seed_table(summary)
    assert seeds.seed_summary({4: results[4]})["loss"]["std"] is None
