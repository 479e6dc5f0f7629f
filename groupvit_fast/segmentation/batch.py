"""The fast path from photos to labels: every window is encoded once, and windows of many images together.

The labels are those of `reference.segment_image`; see `decode` for what "those" means.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

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

PIXELS_PER_FORWARD = {"cpu": 1 << 20, "cuda": 1 << 21}
"""Size of one encoder call: on a GPU 10 windows of 448 px; on a CPU 5, whose largest activations (26 MB)
still come from memory that the allocator keeps, while fresh pages cost 10 to 25 % of the call."""


@torch.no_grad()
def segment_batch(
    model: torch.nn.Module,
    images: Sequence[Tensor],
    text: ClassText,
    protocol: Protocol,
    *,
    precision: str = "fp32",
    stages: bool = False,
) -> list[Segmentation]:
    """`segment_image` for a list of images (uint8 [H, W, 3]) on the model's device, windows batched.

    The result holds the same labels; see the module's docstring for what "same" means.

    precision: "bf16" runs the encoder in bfloat16, which moves some labels.
    stages: also tell the groups of the earlier grouping stages.
    """
    encoded = encode_batch(model, images, text, protocol, precision=precision, stages=stages)
    return decode_batch(encoded, text, protocol)


class EncodedImage(NamedTuple):
    """An image of `size` (H, W) as its windows, with their places in the resized image."""

    size: tuple[int, int]
    boxes: list[Box]
    windows: list[Window]


@torch.no_grad()
def encode_batch(
    model: torch.nn.Module,
    images: Sequence[Tensor],
    text: ClassText,
    protocol: Protocol,
    *,
    precision: str = "fp32",
    stages: bool = False,
) -> list[EncodedImage]:
    """The first half of `segment_batch`; it does not depend on the protocol's background threshold."""
    device = next(model.parameters()).device
    pixels = [prepare(image.to(device), protocol) for image in images]
    boxes = [window_boxes(*item.shape[-2:], protocol) for item in pixels]
    windows = encode_windows(model, pixels, boxes, text, protocol, precision, stages)
    sizes = [tuple(image.shape[:2]) for image in images]
    return [EncodedImage(*parts) for parts in zip(sizes, boxes, windows, strict=True)]


def decode_batch(encoded: Sequence[EncodedImage], text: ClassText, protocol: Protocol) -> list[Segmentation]:
    """The second half of `segment_batch`."""
    results: list[Segmentation | None] = [None] * len(encoded)
    single: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, (size, boxes, windows) in enumerate(encoded):
        if len(boxes) == 1 and size == (boxes[0].bottom, boxes[0].right):
            single[size].append(index)
        else:
            results[index] = decode_windows(windows, boxes, size, text, protocol)
    for size, members in single.items():
        windows = [encoded[index].windows[0] for index in members]
        decoded = decode_single_windows(windows, size, text, protocol)
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
    stages: bool = False,
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
        count = windows_per_forward(height, width, text.embeddings.device)
        for start in range(0, len(members), count):
            part = members[start : start + count]
            crops = [pixels[index][(slice(None), *boxes[index][number].slices())] for index, number in part]
            with autocast:
                encoding = model.encode_groups(torch.stack(crops))
            decodable = named(encoding, text, protocol, scale, stages)
            for (index, number), window in zip(part, decodable, strict=True):
                windows[index][number] = window
    return windows


def windows_per_forward(height: int, width: int, device: torch.device) -> int:
    """How many windows one call of the encoder takes."""
    return max(1, PIXELS_PER_FORWARD["cuda" if device.type == "cuda" else "cpu"] // (height * width))


def named(
    encoding: GroupEncoding, text: ClassText, protocol: Protocol, scale: Tensor, stages: bool = False
) -> list[Window]:
    """What decoding needs of each window of a batch."""
    scores = group_class_scores(encoding, text, protocol, scale)
    if not scores.isfinite().all():
        raise UserError("the model gives NaN: these weights are damaged or diverged; use another checkpoint")
    maps = low_resolution_maps(encoding).float()
    earlier = []
    if stages:
        for count in range(1, len(encoding.maps)):
            earlier.append(low_resolution_maps(encoding._replace(maps=encoding.maps[:count])).float())
    return [
        Window(maps[index], scores[index], tuple(stage[index] for stage in earlier))
        for index in range(len(scores))
    ]
