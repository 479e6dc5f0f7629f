"""A very small model and a made-up loader: what the tests of the loop and of its safety share."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from groupvit_fast.model.groupvit import create_model
from groupvit_fast.model.presets import ImageConfig, ModelConfig, TextConfig
from groupvit_fast.training import checkpoint
from groupvit_fast.training.config import TrainConfig
from groupvit_fast.training.metrics import TIMINGS
from groupvit_fast.training.trainer import Trainer

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
    bad_samples = 0

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

    def sample_names(self):
        return [f"batch{self.position - 1}/{row}" for row in range(6)]

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
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def open_run(run):
    """What `fit` does before the first step, for tests that make steps one by one."""
    run.journal.__enter__()
