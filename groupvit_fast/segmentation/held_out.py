"""The labelled images a training run is measured on: one or several datasets, and a picture of the first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from groupvit_fast.console import UserError
from groupvit_fast.segmentation.datasets import SegmentationDataset, open_dataset
from groupvit_fast.segmentation.evaluation import evaluate, examples_picture
from groupvit_fast.segmentation.pictures import save_atomically
from groupvit_fast.segmentation.protocols import Protocol


@dataclass(frozen=True)
class HeldOut:
    """What segmentation is measured on, and how. The first dataset is the one whose mIoU counts."""

    datasets: dict[str, SegmentationDataset]
    protocol: Protocol
    background_threshold: float | None
    device: str

    @classmethod
    def open(
        cls,
        places: list[str],
        layout: str,
        protocol: Protocol,
        background_threshold: float | None,
        device: str,
    ) -> HeldOut:
        """`places` are folders, or DATASET=FOLDER; `layout` is the dataset of those without a name."""
        datasets = {}
        for place in places:
            name, equals, folder = place.partition("=")
            name, folder = (name, folder) if equals and not Path(place).exists() else (layout, place)
            if name in datasets:
                raise UserError(f"--eval-data {place}: there are two of {name}")
            datasets[name] = open_dataset(name, Path(folder).expanduser())
        return cls(datasets, protocol, background_threshold, device)

    def evaluate(self, model: torch.nn.Module) -> dict[str, Any]:
        """The results of the first dataset; those of the others by name under `others`."""
        results = [
            evaluate(model, dataset, self.protocol, **self._options).to_json()
            for dataset in self.datasets.values()
        ]
        others = dict(zip(list(self.datasets)[1:], results[1:], strict=True))
        return results[0] | ({"others": others} if others else {})

    def picture(self, model: torch.nn.Module, title: str, path: Path, count: int = 6) -> None:
        """Images of the first dataset, always the same ones, with truth, prediction and groups."""
        dataset = next(iter(self.datasets.values()))
        options = {"title": title, "count": count, **self._options}
        save_atomically(examples_picture(model, dataset, self.protocol, **options), path)

    @property
    def _options(self) -> dict[str, Any]:
        return {"device": self.device, "background_threshold": self.background_threshold}
