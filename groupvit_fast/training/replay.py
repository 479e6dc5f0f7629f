"""Repeat a step from the file that a stopped run left: `python -m groupvit_fast.training.replay FILE`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from groupvit_fast.console import UserError, run_command
from groupvit_fast.model.groupvit import create_model
from groupvit_fast.model.presets import ModelConfig
from groupvit_fast.training import guard, options
from groupvit_fast.training.distributed import World
from groupvit_fast.training.trainer import Trainer


class _OneBatch:
    """A loader that has one batch."""

    steps_per_epoch = 1
    bad_samples = 0

    def __init__(self, batch: Any, names: list[str]) -> None:
        self.batch, self.names = batch, names

    def __iter__(self) -> Iterator[Any]:
        yield self.batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def sample_names(self) -> list[str]:
        return self.names


def replay(path: str | Path, *, device: str = "cpu") -> tuple[guard.Finding, list[str]]:
    """Run the step again, alone, on `device`; what it finds, and the names of the samples in the batch.

    With several processes the losses compared a batch with those of the others, which are not in the file;
    what happens up to the embeddings is repeated exactly.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    model = create_model(ModelConfig.from_dict(saved["model"]))
    model.load_state_dict(saved["weights"])
    batch = SimpleNamespace(**{name: value.to(device) for name, value in saved["batch"].items()})
    config = options.from_values(saved["config"] | {"compile": False, "quiet": True}, str(path))
    loader = _OneBatch(batch, saved["samples"])
    trainer = Trainer(
        model, loader, config, output=Path(path).parent, device=device, dtype=saved["dtype"],
        world=World(rank=saved["rank"]),
    )  # fmt: skip
    trainer.step, trainer.recovery.rewinds = saved["step"] + 1, saved["rewinds"]
    return guard.find(trainer, batch, trainer.model), saved["samples"]


def main(argv: Sequence[str] | None = None) -> int:
    files = sys.argv[1:] if argv is None else argv
    if not files:
        raise UserError("name the replay file that the stopped run wrote")
    for file in files:
        finding, samples = replay(Path(file))
        print(f"{file}: {'first in ' + finding.place if finding.place else 'finite'}")
        print("samples: " + ", ".join(samples))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
