"""Segmentation scores from integer counts: matrices and sums first, ratios last.

Counts are int64 and additive over images, batches and ranks, so a sum of parts equals the whole exactly.
mIoU follows the public benchmarks: intersection over union of each class on the whole split, ignored pixels
left out, classes that occur neither in the truth nor in the prediction left out of the mean.

Shapes: K classes, N groups, H x W pixels. Counts [3, K] are the right, the true and the predicted pixels of
each class.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE = 255
WIDE_IGNORE = 65535
MOST_NARROW_CLASSES = 254
PURE_SHARE = 0.8
"""A group is pure if this share of its labelled pixels belongs to one class."""
MIN_GROUP_SHARE = 0.01
"""Groups smaller than this share of the labelled pixels are too small to judge their name."""


def ignored_label(num_classes: int) -> int:
    """The label of pixels that do not count: 255, or 65535 where there are more than 254 classes."""
    return IGNORE if num_classes <= MOST_NARROW_CLASSES else WIDE_IGNORE


def confusion_matrix(target: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Count pixels by (true class, predicted class): int64 [K, K]; ignored pixels do not count.

    Raises ValueError for a label outside 0..K-1: it would be counted as another pair of classes.
    """
    return joint_histogram(target, prediction, num_classes, num_classes)


def joint_histogram(rows: Tensor, columns: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """Count pairs of labels: int64 [num_rows, num_columns]; pixels where `rows` is ignored do not count."""
    if rows.shape != columns.shape:
        raise ValueError(f"label maps differ in size: {list(rows.shape)} and {list(columns.shape)}")
    rows, columns = rows.long(), columns.long()
    ignored = rows == ignored_label(num_rows)
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


def class_counts_of_maps(target: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """int64 [3, K] of two label maps, without a matrix; the range of the labels is checked as there."""
    if target.shape != prediction.shape:
        raise ValueError(f"label maps differ in size: {list(target.shape)} and {list(prediction.shape)}")
    only = torch.zeros((), dtype=torch.int64, device=target.device)
    return counts_by_image(target.flatten(), prediction.flatten(), only, 1, num_classes)[0]


def counts_by_image(
    target: Tensor, prediction: Tensor, image: Tensor, images: int, num_classes: int
) -> Tensor:
    """int64 [images, 3, K] of many pixels; `image` tells which image each belongs to."""
    ignored = target == ignored_label(num_classes)
    target, prediction = target.long(), prediction.long()
    _require_range(torch.where(ignored, 0, target), num_classes)
    _require_range(prediction, num_classes)
    # Pixels that do not count go to a class of their own, which is cheaper than picking the others out.
    none = num_classes
    hit = torch.where(target == prediction, target, none)
    parts = [torch.where(ignored, none, part) for part in (hit, target, prediction)]
    offset = image * (num_classes + 1)
    counts = [torch.bincount(part + offset, minlength=images * (num_classes + 1)) for part in parts]
    return torch.stack(counts).view(3, images, num_classes + 1)[..., :num_classes].transpose(0, 1)


def class_counts(confusion: Tensor) -> Tensor:
    """[K, K] -> [3, K]."""
    return torch.stack([confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)])


def iou(counts: Tensor) -> Tensor:
    """Counts [..., 3, K] -> IoU of each class, float64 [..., K]; NaN for one neither true nor predicted."""
    hit, true, predicted = counts.double().unbind(dim=-2)
    return hit / (true + predicted - hit)


def class_iou(confusion: Tensor) -> Tensor:
    """IoU of each class, float64 [K]; NaN for a class that is neither in the truth nor predicted."""
    return iou(class_counts(confusion))


def mean_iou(confusion: Tensor) -> float:
    """Mean of `class_iou` over the classes that occur; NaN if there is no labelled pixel."""
    return class_iou(confusion).nanmean().item()


def accuracy(counts: Tensor) -> Tensor:
    """Share of each true class that is labelled correctly, float64 [K]; NaN for a class not in the truth."""
    return counts[0].double() / counts[1]


def pixel_accuracy(counts: Tensor) -> float:
    """Share of labelled pixels with the right class; NaN if there is none."""
    return (counts[0].sum().double() / counts[1].sum()).item()


def largest_class_counts(counts: Tensor) -> Tensor:
    """The counts of a predictor that answers the most frequent true class everywhere."""
    true = counts[1]
    answered = torch.zeros_like(true)
    answered[true.argmax()] = true.sum()
    return torch.stack([torch.minimum(answered, true), true, answered])


def group_histograms(
    target: Tensor, prediction: Tensor, groups: Tensor, num_groups: int, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Labelled pixels by group and true class, and by group and predicted class: two int64 [N, K]."""
    truth = joint_histogram(target, groups, num_classes, num_groups).T
    ignored = ignored_label(num_classes)
    named = prediction.masked_fill(target == ignored, ignored)
    return truth, joint_histogram(named, groups, num_classes, num_groups).T


def oracle_counts(histogram: Tensor) -> Tensor:
    """Counts [3, K] if every group had its best class; histogram [N, K] counts true classes by group."""
    best = histogram.argmax(dim=1)
    none = torch.zeros_like(histogram[0])
    hit = none.index_add(0, best, histogram.gather(1, best[:, None])[:, 0])
    return torch.stack([hit, histogram.sum(dim=0), none.index_add(0, best, histogram.sum(dim=1))])


def best_masks(truth: Tensor, image_of_group: Tensor) -> tuple[int, Tensor]:
    """How well the groups cover what is there, whatever they are called.

    truth [N, K]: labelled pixels by group and true class. Returns the number of (image, class) pairs that
    occur, and float64 of each the Jaccard index (IoU) of the group that fits it best.
    """
    images = int(image_of_group[-1]) + 1 if len(image_of_group) else 0
    of_class = truth.new_zeros(images, truth.shape[1]).index_add_(0, image_of_group, truth)
    union = truth.sum(dim=1, keepdim=True) + of_class[image_of_group] - truth
    jaccard = truth.double() / union.clamp(min=1)
    index = image_of_group[:, None].expand_as(jaccard)
    best = jaccard.new_zeros(of_class.shape).scatter_reduce(0, index, jaccard, "amax")[of_class > 0]
    return len(best), best


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


def bootstrap_interval(
    image_counts: Tensor, *, samples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Confidence interval of mIoU over the choice of images: percentiles of `samples` redrawn datasets.

    image_counts: [n, 3, K]. NaN where there is no image.
    """
    count = len(image_counts)
    if count == 0:
        return float("nan"), float("nan")
    generator = torch.Generator().manual_seed(seed)
    flat = image_counts.flatten(1).double()
    means = []
    for _ in range(0, samples, 100):
        drawn = torch.randint(count, (100, count), generator=generator)
        weights = torch.zeros(100, count, dtype=torch.float64)
        weights.scatter_add_(1, drawn, torch.ones_like(weights))
        means.append(iou((weights @ flat).unflatten(1, image_counts.shape[1:])).nanmean(dim=1))
    edges = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.cat(means).nanquantile(edges).tolist()
    return low, high
