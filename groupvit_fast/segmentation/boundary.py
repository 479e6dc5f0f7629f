"""Boundary IoU: the score of the pixels near the contours, which large regions cannot make up for.

Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation" (CVPR 2021), section 4:
the IoU of the parts of the true and of the predicted mask that lie within a distance of their own contour,
2 % of the image's diagonal; the border of the image is a contour.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from groupvit_fast.segmentation.metrics import ignored_label

SHARE_OF_DIAGONAL = 0.02
_OUTSIDE = -1


def boundary_counts(target: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """int64 [3, K]: pixels near both contours of the right class, near the true one, near the predicted one.

    target, prediction: labels [H, W]. Ignored pixels do not count, but end the region beside them.
    """
    height, width = target.shape
    distance = max(1, round(SHARE_OF_DIAGONAL * math.hypot(height, width)))
    counted = target != ignored_label(num_classes)
    near_truth, near_prediction = (
        near_contour(labels, distance) & counted for labels in (target, prediction)
    )
    both = near_truth & near_prediction & (target == prediction)
    parts = target[both], target[near_truth], prediction[near_prediction]
    return torch.stack([torch.bincount(part.long(), minlength=num_classes) for part in parts])


def near_contour(labels: Tensor, distance: int) -> Tensor:
    """bool [H, W]: a pixel of another label, or the outside, lies within `distance` lines and columns."""
    padded = F.pad(labels.int(), [distance] * 4, value=_OUTSIDE)
    highest, lowest = padded, padded
    for axis in (0, 1):
        highest = over_windows(torch.maximum, highest, axis, 2 * distance + 1)
        lowest = over_windows(torch.minimum, lowest, axis, 2 * distance + 1)
    return highest != lowest


def over_windows(combine: Callable[[Tensor, Tensor], Tensor], values: Tensor, axis: int, size: int) -> Tensor:
    """`combine` all values in each window of `size` along `axis`, doubling the windows step by step."""
    reached = 1
    while reached < size:
        step = min(reached, size - reached)
        count = values.shape[axis] - step
        values = combine(values.narrow(axis, 0, count), values.narrow(axis, step, count))
        reached += step
    return values
