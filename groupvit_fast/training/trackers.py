"""Metrics and pictures for TensorBoard and Weights & Biases, beside metrics.jsonl; both are optional."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from groupvit_fast.console import UserError


class Tracker(Protocol):
    """Takes numbers by name, and pictures (PNG files), of a step."""

    def numbers(self, step: int, values: dict[str, float]) -> None: ...
    def picture(self, step: int, name: str, path: Path) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard; those of steps that a resumed run repeats are purged."""

    def __init__(self, output: Path, config: dict[str, Any], resume_from: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--report-to tensorboard: not installed; pip install tensorboard") from None
        self.writer = SummaryWriter(str(output / "tensorboard"), purge_step=resume_from + 1)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def picture(self, step: int, name: str, path: Path) -> None:
        with Image.open(path) as image:
            self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """One run of the project `groupvit_fast`, continued when the run is resumed."""

    def __init__(self, output: Path, config: dict[str, Any], resume_from: int) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("--report-to wandb: not installed; pip install wandb") from None
        name = output.resolve().name
        self.wandb = wandb
        self.run = wandb.init(
            project="groupvit_fast", name=name, id=name, resume="allow", config=config, dir=str(output)
        )

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self.run.log({name: self.wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


KINDS: dict[str, type] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def check_names(names: str) -> list[str]:
    """`"tensorboard,wandb"` as a list; an unknown name is a `UserError`."""
    chosen = [name.strip() for name in names.split(",") if name.strip() not in ("", "none")]
    for name in chosen:
        if name not in KINDS:
            raise UserError(f"--report-to {name}: not one of {', '.join(KINDS)}")
    return chosen


class Trackers:
    """All that were asked for, as one."""

    def __init__(self, names: str, output: Path, config: dict[str, Any], resume_from: int) -> None:
        self.all: list[Tracker] = [KINDS[name](output, config, resume_from) for name in check_names(names)]

    def metrics(self, step: int, record: dict[str, Any]) -> None:
        """The numbers of a line of metrics.jsonl."""
        values = {
            name: float(v) for name, v in record.items() if isinstance(v, (int, float)) and name != "step"
        }
        for tracker in self.all:
            tracker.numbers(step, {f"train/{name}": value for name, value in values.items()})

    def evaluation(self, step: int, results: dict[str, Any], picture: Path | None) -> None:
        """The scores of an evaluation and the picture that belongs to it."""
        scores = {"miou": results["miou"]}
        if "ema" in results:
            scores["miou_ema"] = results["ema"]["miou"]
        scores |= {f"miou_{name}": other["miou"] for name, other in results.get("others", {}).items()}
        for tracker in self.all:
            tracker.numbers(step, {f"evaluation/{name}": value for name, value in scores.items()})
            if picture:
                tracker.picture(step, "evaluation/groups", picture)

    def close(self) -> None:
        for tracker in self.all:
            tracker.close()
