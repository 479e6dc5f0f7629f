"""The loop on a very small model and a made-up loader: repeatable, resumable, safe against bad numbers."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass, replace

import pytest
import torch

from groupvit_fast.console import UserError
from groupvit_fast.model.groupvit import create_model
from groupvit_fast.model.presets import ImageConfig, ModelConfig, TextConfig
from groupvit_fast.training import checkpoint
from groupvit_fast.training.config import TrainConfig
from groupvit_fast.training.trainer import Trainer, mix

MODEL = ModelConfig(
    image=ImageConfig(
        image_size=16, patch_size=8, width=16, heads=2, depths=(2, 1), group_tokens=(3,), output_groups=(3,),
        drop_path=0.4,
    ),
    text=TextConfig(context_length=8, vocab_size=32, width=16, layers=1, heads=2),
    embed_dim=8,
    projector_hidden=12,
)  # fmt: skip
CONFIG = TrainConfig(steps=12, batch_size=6, lr=1e-2, warmup_steps=3, multi_label=2, log_every=4,
                     save_every=6, max_bad_steps=3, quiet=True)  # fmt: skip


@dataclass
class Batch:
    images: torch.Tensor
    texts: torch.Tensor
    text_index: torch.Tensor


class Loader:
    """Batch n is a function of n (or always the `same`); `spoil` maps n to what is done to the batch."""

    steps_per_epoch = 5

    def __init__(self, spoil=None, same=False):
        self.position, self.spoil, self.same = 0, spoil or {}, same

    def __iter__(self):
        while True:
            generator = torch.Generator().manual_seed(0 if self.same else self.position)
            images = torch.randn(6, 3, 16, 16, generator=generator)
            texts = torch.randint(1, 32, (9, 8), generator=generator)
            texts[:, -1] = 31
            batch = Batch(images, texts, torch.randint(9, (6, 3), generator=generator))
            if self.position in self.spoil:
                self.spoil[self.position](batch)
            self.position += 1
            yield batch

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def nan_pixels(batch):
    batch.images[2] = float("nan")


def trainer(folder, config=CONFIG, loader=None, settings=MODEL, **arguments):
    folder.mkdir(exist_ok=True)
    model = create_model(settings, seed=config.seed)
    return Trainer(model, loader or Loader(), config, output=folder, **arguments)


def resumed(folder, **arguments):
    again = trainer(folder, **arguments)
    again.resume(checkpoint.find(folder, print), print)
    return again


def bits(run):
    moments = [value for state in run.optimizer.adamw.state.values() for value in state.values()]
    return [value.detach().numpy().tobytes() for value in [*run.model.state_dict().values(), *moments]]


def metrics(folder):
    """The lines without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_s", "data_wait")} for line in lines]


def test_loss_falls_and_the_run_folder_is_complete(tmp_path):
    run = trainer(tmp_path, replace(CONFIG, steps=60, log_every=20), Loader(same=True))
    assert run.fit() is None
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [20, 40, 60]
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    assert lines[-1]["loss"] == pytest.approx(lines[-1]["contrastive"] + lines[-1]["multi_label"], rel=1e-5)
    assert 1 <= lines[-1]["groups_in_use"] <= 3
    step = tmp_path / "checkpoints" / "step_00000060"
    assert {p.name for p in step.iterdir()} == {
        "model.safetensors",
        "config.json",
        "trainer.pt",
        "README.md",
        "SHA256SUMS",
    }
    assert ModelConfig.from_dict(json.loads((step / "config.json").read_text())["model"]) == MODEL


@pytest.mark.parametrize("threads", [1, 2])
def test_same_seed_same_bits_and_another_seed_not(tmp_path, threads):
    torch.set_num_threads(threads)
    runs = [
        trainer(tmp_path / name, replace(CONFIG, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    for run in runs:
        torch.manual_seed(id(run))  # the state outside must not matter
        run.fit()
    a, b, c = (metrics(tmp_path / name) for name in "abc")
    assert bits(runs[0]) == bits(runs[1])
    assert a == b
    assert a != c


@pytest.mark.parametrize("stop", [4, 6, 7])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, stop):
    """Stopped on and between log points and checkpoints; drop path, noise, bad steps and moments go on."""
    spoil = {2: nan_pixels, 6: nan_pixels, 9: nan_pixels}
    whole = trainer(tmp_path / "whole", loader=Loader(spoil))
    whole.fit()
    interrupted = trainer(
        tmp_path / "parts", loader=Loader(spoil | {stop - 1: lambda batch: ask(spoil, stop, batch)})
    )
    assert interrupted.fit() == signal.SIGTERM
    assert interrupted.step == stop
    last = resumed(tmp_path / "parts", loader=Loader(spoil))
    assert last.step == stop
    assert last.fit() is None
    assert bits(last) == bits(whole)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert metrics(tmp_path / "whole")[-1]["bad_steps"] == 3


def ask(spoil, stop, batch):
    """A signal in the middle of the step; the batch itself is as in the other run."""
    if stop - 1 in spoil:
        spoil[stop - 1](batch)
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_killed_run_repeats_what_was_lost(tmp_path):
    """Killed at step 10: metrics after the checkpoint of step 6 are written anew, a torn line goes."""

    def die(batch):
        raise RuntimeError("killed")

    whole = trainer(tmp_path / "whole")
    whole.fit()
    with pytest.raises(RuntimeError, match="killed"):
        trainer(tmp_path / "parts", loader=Loader({10: die})).fit()
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    last = resumed(tmp_path / "parts")
    assert last.step == 6
    last.fit()
    assert bits(last) == bits(whole)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_a_bad_batch_changes_neither_weights_nor_running_statistics(tmp_path):
    run = trainer(tmp_path, replace(CONFIG, log_every=1), Loader({1: nan_pixels}))
    run._open()
    batches = iter(run.loader)
    run.train_step(next(batches))
    before = bits(run)
    run.train_step(next(batches))
    assert bits(run) == before
    run.log()
    run.train_step(next(batches))
    assert bits(run) != before
    assert run.last_record["bad_steps"] == 1


def test_endless_bad_steps_end_with_a_diagnosis(tmp_path):
    spoil = dict.fromkeys(range(7, 20), nan_pixels)
    run = trainer(tmp_path, replace(CONFIG, steps=30), Loader(spoil))
    with pytest.raises(
        UserError, match=r"step 12: 5 steps in a row.*gradient of .*step 7 are kept.*step_00000006"
    ):
        run.fit()
    assert all(value.isfinite().all() for value in run.model.state_dict().values())


def test_evaluation_happens_before_between_and_after_and_is_not_repeated(tmp_path):
    seen = []

    def evaluate(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        torch.rand(3)
        seen.append(len(seen))
        return {"miou": len(seen) / 10}

    config = replace(CONFIG, eval_every=5)
    run = trainer(tmp_path / "a", config, evaluate=evaluate)
    run.fit()
    assert sorted(run.evaluations) == [0, 5, 10, 12]
    assert run.model.training
    again = resumed(tmp_path / "a", config=config, evaluate=evaluate)
    again.fit()
    assert len(seen) == 5  # only the last one, which came after the last checkpoint
    assert again.evaluations[0] == {"miou": 0.1}
    plain = trainer(tmp_path / "b")
    plain.fit()
    assert bits(plain) == bits(run)


def test_the_host_is_asked_only_at_log_points(tmp_path, monkeypatch):
    run = trainer(tmp_path)
    run._open()
    batches = iter(run.loader)
    run.train_step(next(batches))
    second = next(batches)
    encoded = run.forward(second.images, second.texts, second.text_index)
    run.forward = lambda *_, **__: encoded  # the model's own manners are not the matter here

    def refuse(*_):
        raise AssertionError("the step waits for the device")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    run.train_step(second)
    with pytest.raises(AssertionError, match="waits"):
        run.log()


def test_prompts_can_be_matched_with_single_groups(tmp_path):
    losses = []
    for match in ("image", "group"):
        config = replace(CONFIG, multi_label_match=match, steps=4)
        run = trainer(tmp_path / match, config, settings=replace(MODEL, projector_layers=1))
        run.fit()
        losses.append(run.last_record)
    assert losses[0]["multi_label"] != losses[1]["multi_label"]


def test_no_noise_means_no_noise(tmp_path):
    keys = []
    for gumbel in (True, False):
        run = trainer(tmp_path, replace(CONFIG, gumbel=gumbel, steps=1))

        def forward(*arguments, plain=run.forward, **options):
            keys.append(arguments[3])
            return plain(*arguments, **options)

        run.forward = forward
        run.fit()
    assert keys[0].tolist() == [mix(0, 0), 0]
    assert keys[1] is None


def test_bf16_keeps_weights_losses_and_norms_in_float32(tmp_path):
    plain = trainer(tmp_path / "plain", replace(CONFIG, steps=1))
    mixed = trainer(tmp_path / "mixed", replace(CONFIG, steps=1), dtype="bf16")
    plain.fit()
    mixed.fit()
    assert mixed.last_record["loss"] != plain.last_record["loss"]
    assert mixed.last_record["loss"] == pytest.approx(plain.last_record["loss"], rel=0.02)
    assert {value.dtype for value in mixed.model.parameters()} == {torch.float32}
    assert mixed.last_record["bad_steps"] == 0


@pytest.mark.slow
def test_compiled_training_is_the_same_training(tmp_path):
    records = []
    for compiled in (False, True):
        run = trainer(tmp_path / str(compiled), replace(CONFIG, compile=compiled, steps=4))
        run.fit()
        records.append(run.last_record)
    assert records[1]["loss"] == pytest.approx(records[0]["loss"], rel=1e-4)
    assert records[1]["grad_norm"] == pytest.approx(records[0]["grad_norm"], rel=1e-3)


def test_mix_spreads():
    assert (
        len({mix(seed, rank, step) % 1000 for seed in range(5) for rank in range(5) for step in range(5)})
        > 110
    )
    assert 0 <= mix(2**70, 1) < 2**63
