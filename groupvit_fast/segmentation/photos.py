"""Segmenting photos in memory: what `GroupViT.segment` calls."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from groupvit_fast.console import UserError
from groupvit_fast.segmentation.batch import check_size, segment_batch
from groupvit_fast.segmentation.evaluation import encode_protocol_classes
from groupvit_fast.segmentation.prompts import check_classes
from groupvit_fast.segmentation.protocols import Protocol
from groupvit_fast.segmentation.protocols import protocol as named_protocol


def segment_photos(
    model: torch.nn.Module,
    images: Sequence[Tensor | np.ndarray],
    labels: Sequence[str],
    *,
    protocol: str | Protocol = "official",
    background_threshold: float | None = None,
) -> list[Tensor]:
    """Label every pixel of each image (uint8 RGB [H, W, 3], any sizes) with one of `labels`.

    labels: class names; "sofa|couch" gives a class two names.
    protocol: a name (`segmentation.protocols`) or one of your own.
    background_threshold: 0 to 1; pixels below it become background. None: every pixel gets a class.

    Returns: int64 [H, W] per image on the model's device; k is `labels[k]`, or with a background threshold 0
    is background and k + 1 is `labels[k]`. Errors: UserError for empty or repeated labels, images of another
    type or shape, unknown protocols. A model in training mode is switched for the call and back.
    """
    if not labels:
        raise UserError("labels is empty; name at least one class")
    entries = check_classes(labels, "labels")
    chosen = (named_protocol(protocol) if isinstance(protocol, str) else protocol).resolve(
        dataset="your classes",
        background=background_threshold is not None,
        image_size=model.config.image.image_size,
        threshold=background_threshold,
    )
    photos = [torch.as_tensor(image) for image in images]
    for number, photo in enumerate(photos):
        if photo.dtype != torch.uint8 or photo.dim() != 3 or photo.shape[2] != 3:
            raise UserError(
                f"image {number} is {photo.dtype} {tuple(photo.shape)}; wanted uint8 [H, W, 3], RGB"
            )
        check_size(*photo.shape[:2], chosen, model.config.image.patch_size)
    training = model.training
    model.eval()
    try:
        text = encode_protocol_classes(model, entries, chosen)
        return [result.labels for result in segment_batch(model, photos, text, chosen)] if photos else []
    finally:
        model.train(training)
