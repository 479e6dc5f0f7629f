"""Resizing photos to the very pixels that the published evaluations saw: cv2.INTER_LINEAR on 8-bit images.

Bilinear sampling without antialias in fixed point: weights are multiples of 1/2048, and the vertical pass
drops four bits of the horizontal sums before it multiplies. Equal to OpenCV 4.5 and 5.0 in every value. An
antialiased resize (Pillow, torchvision, DALI by default) gives other pixels and other labels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WEIGHT_ONE = 2048


class FixedTaps(NamedTuple):
    """Along one axis: two source positions and their weights (sum 2048), each [n]."""

    first: Tensor
    second: Tensor
    first_weight: Tensor
    second_weight: Tensor


def resize_photo(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 [H, W, 3] to float32 [3, *size] holding whole numbers 0-255."""
    if tuple(image.shape[:2]) == tuple(size):
        return image.permute(2, 0, 1).float()
    down = _fixed_taps(image.shape[0], size[0], image.device)
    across = _fixed_taps(image.shape[1], size[1], image.device, inside=True)
    left = image[:, across.first].int().mul_(across.first_weight[:, None])
    right = image[:, across.second].int().mul_(across.second_weight[:, None])
    lines = left.add_(right).bitwise_right_shift_(4)
    upper = lines[down.first].mul_(down.first_weight[:, None, None]).bitwise_right_shift_(16)
    lower = lines[down.second].mul_(down.second_weight[:, None, None]).bitwise_right_shift_(16)
    return upper.add_(lower).add_(2).bitwise_right_shift_(2).permute(2, 0, 1).float()


def _fixed_taps(source: int, wanted: int, device: torch.device, *, inside: bool = False) -> FixedTaps:
    """Taps of `wanted` outputs over `source` inputs.

    inside: move positions beyond the first and last centre onto it (OpenCV's columns); otherwise only the
        indices are moved and both weights stay, which rounds differently (OpenCV's rows).
    """
    # The position is computed in float64 and only then rounded to float32, as OpenCV does.
    position = (torch.arange(wanted, dtype=torch.float64) + 0.5) * (source / wanted) - 0.5
    position = (position.clamp(0, source - 1) if inside else position).float()
    below = position.floor()
    weight = position - below
    indices = (below.long() + step for step in (0, 1))
    weights = ((share * WEIGHT_ONE).round().int() for share in (1 - weight, weight))
    return FixedTaps(*(index.clamp(0, source - 1).to(device) for index in indices),
                     *(part.to(device) for part in weights))  # fmt: skip
