"""Which background threshold is best: every image encoded once, decoded under each threshold."""

from __future__ import annotations

from dataclasses import replace

import torch

from groupvit_fast.console import UserError
from groupvit_fast.segmentation import metrics
from groupvit_fast.segmentation.batch import decode_batch, encode_batch
from groupvit_fast.segmentation.evaluation import Run, ShowProgress, encode_protocol_classes, evaluating
from groupvit_fast.segmentation.reading import batches, read_ahead

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))


@torch.no_grad()
def sweep_thresholds(
    run: Run, thresholds: tuple[float, ...] = THRESHOLDS, show: ShowProgress | None = None
) -> list[tuple[float, float]]:
    """(threshold, mIoU) for the dataset and protocol of `run`, which must have a background class."""
    if not run.dataset.background:
        raise UserError(
            f"dataset {run.dataset.name} has no background class, so there is no threshold to choose"
        )
    variants = [replace(run.protocol, background_threshold=threshold) for threshold in thresholds]
    classes = len(run.dataset.class_names)
    counts = torch.zeros(len(variants), 3, classes, dtype=torch.int64, device=run.device)
    done = 0
    with evaluating(run.model, run.precision):
        text = encode_protocol_classes(run.model, run.dataset.foreground, run.protocol)
        pairs = run.usable(read_ahead(run.dataset, run.items, 2 * run.batch_size))
        for batch in batches(pairs, run.batch_size, run.protocol.short_side**2):
            images, targets = zip(*(pair for *_, pair in batch), strict=True)
            encoded = encode_batch(run.model, images, text, run.protocol, precision=run.precision)
            for row, variant in enumerate(variants):
                for result, target in zip(decode_batch(encoded, text, variant), targets, strict=True):
                    target = target.to(result.labels.device)
                    counts[row] += metrics.class_counts_of_maps(target, result.labels, classes)
            done += len(batch)
            if show is not None:
                show(done, run.total, metrics.iou(counts).nanmean(dim=1).max().item())
    run.require_images(done)
    return list(zip(thresholds, metrics.iou(counts).nanmean(dim=1).tolist(), strict=True))


def table(results: list[tuple[float, float]]) -> str:
    """A line a threshold, the best one marked."""
    best = max(range(len(results)), key=lambda index: results[index][1])
    lines = [
        f"{threshold:>9g}  {miou:.3f}{'  best' if index == best else ''}"
        for index, (threshold, miou) in enumerate(results)
    ]
    return "\n".join(["threshold   mIoU", *lines])
