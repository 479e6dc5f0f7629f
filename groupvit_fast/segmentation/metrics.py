"""Segmentation scores from integer counts: confusion matrices first, ratios last.

Counts are int64 and additive over images, batches and ranks, so a sum of parts equals the whole exactly.
mIoU follows the public benchmarks: intersection over union of each class on the whole split, pixels labelled
255 left out, classes that occur neither in the truth nor in the prediction left out of the mean.

Shapes: K classes, N groups of one image, H x W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE = 255
PURE_SHARE = 0.8
"""A group is pure if this share of its labelled pixels belongs to one class."""
MIN_GROUP_SHARE = 0.01
"""Groups smaller than this share of the labelled pixels are too small to judge their name."""


def confusion_matrix(target: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Count pixels by (true class, predicted class): int64 [K, K]; pixels with target 255 do not count.

    Raises ValueError for a label outside 0..K-1: it would be counted as another pair of classes.
    """
    return joint_histogram(target, prediction, num_classes, num_classes)


def joint_histogram(rows: Tensor, columns: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """Count pairs of labels: int64 [num_rows, num_columns]; pixels where `rows` is 255 do not count."""
    if rows.shape != columns.shape:
        raise ValueError(f"label maps differ in size: {list(rows.shape)} and {list(columns.shape)}")
    rows, columns = rows.long(), columns.long()
    ignored = rows == IGNORE
    _require_range(torch.where(ignored, 0, rows), num_rows)
    _require_range(columns, num_columns)
    # Ignored pixels go to a row of their own, which is cheaper than picking the others out.
    pairs = torch.where(ignored, num_rows, rows) * num_columns + columns
    counts = torch.bincount(pairs.flatten(), minlength=(num_rows + 1) * num_columns)
    return counts.view(num_rows + 1, num_columns)[:num_rows]


def _require_range(labels: Tensor, count: int) -> None:
    low, high = (int(value) for value in labels.aminmax()) if labels.numel() else (0, 0)
    if low < 0 or high >= count:
        raise ValueError(f"labels must be 0 to {count - 1}, got {low} to {high}")


def class_iou(confusion: Tensor) -> Tensor:
    """IoU of each class, float64 [K]; NaN for a class that is neither in the truth nor predicted."""
    confusion = confusion.double()
    hit = confusion.diagonal()
    return hit / (confusion.sum(dim=0) + confusion.sum(dim=1) - hit)


def mean_iou(confusion: Tensor) -> float:
    """Mean of `class_iou` over the classes that occur; NaN if there is no labelled pixel."""
    return class_iou(confusion).nanmean().item()


def class_accuracy(confusion: Tensor) -> Tensor:
    """Share of each true class that is labelled correctly, float64 [K]; NaN for a class not in the truth."""
    confusion = confusion.double()
    return confusion.diagonal() / confusion.sum(dim=1)


def pixel_accuracy(confusion: Tensor) -> float:
    """Share of labelled pixels with the right class; NaN if there is none."""
    confusion = confusion.double()
    return (confusion.diagonal().sum() / confusion.sum()).item()


def largest_class_confusion(confusion: Tensor) -> Tensor:
    """The confusion matrix of a predictor that answers the most frequent true class everywhere."""
    frequency = confusion.sum(dim=1)
    result = torch.zeros_like(confusion)
    result[:, frequency.argmax()] = frequency
    return result


def group_histograms(
    target: Tensor, prediction: Tensor, groups: Tensor, num_groups: int, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Labelled pixels by group and true class, and by group and predicted class: two int64 [N, K]."""
    truth = joint_histogram(target, groups, num_classes, num_groups).T
    named = prediction.masked_fill(target == IGNORE, IGNORE)
    return truth, joint_histogram(named, groups, num_classes, num_groups).T


def oracle_confusion(histogram: Tensor) -> Tensor:
    """Confusion matrix if every group had its best class; histogram [N, K] counts true classes by group."""
    best = histogram.argmax(dim=1)
    num_classes = histogram.shape[1]
    return torch.zeros(num_classes, num_classes, dtype=torch.int64, device=histogram.device).index_add_(
        1, best, histogram.T.contiguous()
    )


def named_groups(truth: Tensor, predicted: Tensor, image_of_group: Tensor) -> tuple[int, int]:
    """How many groups are pure, and how many of those have the right name.

    truth, predicted: [N, K] labelled pixels by group and true, respectively predicted class; image_of_group
    [N]: the image each group belongs to. The name of a group is the class most of its pixels were given.
    """
    size = truth.sum(dim=1)
    labelled = torch.zeros_like(size).index_add_(0, image_of_group, size)[image_of_group]
    count, best = truth.max(dim=1)
    pure = (count >= PURE_SHARE * size) & (size > 0) & (size >= MIN_GROUP_SHARE * labelled)
    right = pure & (predicted.argmax(dim=1) == best)
    return int(pure.sum()), int(right.sum())
