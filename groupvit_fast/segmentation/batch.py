"""The fast path from photos to labels: every window is encoded once, and windows of many images together.

The labels are those of `reference.segment_image`; see `decode` for what "those" means.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from groupvit_fast.console import UserError
from groupvit_fast.model import GroupEncoding
from groupvit_fast.segmentation.decode import (
    Segmentation,
    Window,
    decode_single_windows,
    decode_windows,
)
from groupvit_fast.segmentation.prompts import ClassText
from groupvit_fast.segmentation.protocols import Protocol
from groupvit_fast.segmentation.segment import (
    Box,
    group_class_scores,
    learnt_scale,
    low_resolution_maps,
    prepare,
    resized_size,
    window_boxes,
)

PIXELS_PER_FORWARD = 1 << 21
"""Size of one encoder call: 512 windows of 64 px, 10 of 448 px."""


@torch.no_grad()
def segment_batch(
    model: torch.nn.Module,
    images: Sequence[Tensor],
    text: ClassText,
    protocol: Protocol,
    *,
    precision: str = "fp32",
) -> list[Segmentation]:
    """`segment_image` for a list of images (uint8 [H, W, 3]) on the model's device, windows batched.

    The result holds the same labels; see the module's docstring for what "same" means. precision: "bf16"
    runs the encoder in bfloat16, which moves some labels.
    """
    device = next(model.parameters()).device
    pixels = [prepare(image.to(device), protocol) for image in images]
    boxes = [window_boxes(*item.shape[-2:], protocol) for item in pixels]
    windows = encode_windows(model, pixels, boxes, text, protocol, precision)
    results: list[Segmentation | None] = [None] * len(images)
    single: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, image in enumerate(images):
        size = tuple(image.shape[:2])
        if len(boxes[index]) == 1 and size == tuple(pixels[index].shape[-2:]):
            single[size].append(index)
        else:
            results[index] = decode_windows(windows[index], boxes[index], size, text, protocol)
    for size, members in single.items():
        decoded = decode_single_windows([windows[index][0] for index in members], size, text, protocol)
        for index, segmentation in zip(members, decoded, strict=True):
            results[index] = segmentation
    return results


def check_size(height: int, width: int, protocol: Protocol, patch_size: int) -> None:
    """Refuse an image that would be thinner than one patch after resizing."""
    size = resized_size(height, width, protocol)
    if min(size) < patch_size:
        raise UserError(
            f"{width} x {height} pixels become {size[1]} x {size[0]} under protocol {protocol.name}, less "
            f"than one patch of {patch_size}; crop the image"
        )


def encode_windows(
    model: torch.nn.Module,
    pixels: Sequence[Tensor],
    boxes: Sequence[Sequence[Box]],
    text: ClassText,
    protocol: Protocol,
    precision: str = "fp32",
) -> list[list[Window]]:
    """Encode the windows of all images, those of one size together, each exactly once."""
    autocast = torch.autocast(text.embeddings.device.type, torch.bfloat16, enabled=precision == "bf16")
    by_size: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for index, image_boxes in enumerate(boxes):
        for number, box in enumerate(image_boxes):
            by_size[box.bottom - box.top, box.right - box.left].append((index, number))
    windows: list[list[Window | None]] = [[None] * len(image_boxes) for image_boxes in boxes]
    scale = learnt_scale(model)
    for (height, width), members in by_size.items():
        count = max(1, PIXELS_PER_FORWARD // (height * width))
        for start in range(0, len(members), count):
            part = members[start : start + count]
            crops = [pixels[index][(slice(None), *boxes[index][number].slices())] for index, number in part]
            with autocast:
                encoding = model.encode_groups(torch.stack(crops))
            for (index, number), window in zip(part, named(encoding, text, protocol, scale), strict=True):
                windows[index][number] = window
    return windows


def named(encoding: GroupEncoding, text: ClassText, protocol: Protocol, scale: Tensor) -> list[Window]:
    """What decoding needs of each window of a batch."""
    scores = group_class_scores(encoding, text, protocol, scale)
    if not scores.isfinite().all():
        raise UserError("the model gives NaN: these weights are damaged or diverged; use another checkpoint")
    maps = low_resolution_maps(encoding).float()
    return [Window(*window) for window in zip(maps, scores, strict=True)]
