"""Pictures of a whole dataset, image by image, beside its scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from groupvit_fast.console import UserError
from groupvit_fast.segmentation.datasets import SegmentationDataset
from groupvit_fast.segmentation.evaluation import encode_protocol_classes, evaluating, resolve_protocol
from groupvit_fast.segmentation.modes import save_modes, view_photo
from groupvit_fast.segmentation.prompts import synonyms
from groupvit_fast.segmentation.protocols import Protocol


def save_gallery(
    model: torch.nn.Module,
    dataset: SegmentationDataset,
    protocol: Protocol,
    modes: Sequence[str],
    folder: Path,
    *,
    limit: int | None = None,
    background_threshold: float | None = None,
) -> int:
    """Write KEY_MODE.png for the first `limit` images and return how many images could be used.

    Images are read and segmented as `evaluate` does; those that it leaves out get no picture.
    """
    protocol = resolve_protocol(model, dataset, protocol, background_threshold)
    names, done = [synonyms(entry)[0] for entry in dataset.class_names], 0
    with evaluating(model):
        text = encode_protocol_classes(model, dataset.foreground, protocol)
        for item in dataset.items[:limit]:
            try:
                image, _ = dataset.read(item)
                view = view_photo(model, image.numpy(), text, protocol, names)
            except UserError:
                continue
            save_modes(view, modes, folder / item.key)
            done += 1
    return done
