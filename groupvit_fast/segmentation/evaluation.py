"""Score a model on a dataset: read ahead, segment in batches, add up counts, report once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from groupvit_fast.console import UserError
from groupvit_fast.segmentation import metrics
from groupvit_fast.segmentation.batch import check_size, segment_batch
from groupvit_fast.segmentation.datasets import Item, SegmentationDataset
from groupvit_fast.segmentation.decode import Segmentation
from groupvit_fast.segmentation.pictures import Example, grid_picture
from groupvit_fast.segmentation.prompts import ClassText, encode_classes, synonyms
from groupvit_fast.segmentation.protocols import Protocol
from groupvit_fast.segmentation.report import ClassResult, Evaluation

READERS = 2

Progress = Callable[[int, int, float], None]
"""Called after each batch with the images done, their total and the mIoU so far."""


class Tally:
    """The additive counts of an evaluation, on one device."""

    def __init__(self, num_classes: int, device: torch.device | str) -> None:
        shape = num_classes, num_classes
        self.confusion = torch.zeros(shape, dtype=torch.int64, device=device)
        self.oracle = torch.zeros(shape, dtype=torch.int64, device=device)
        self.images = self.windows = self.used_groups = self.pure_groups = self.named_groups = 0
        self.groups_per_window = 0

    def add(self, segmentations: Sequence[Segmentation], targets: Sequence[Tensor], groups: int) -> None:
        """Count a batch; the groups of all its images are numbered through, so one pass counts them all."""
        num_classes = len(self.confusion)
        counts = [item.num_groups for item in segmentations]
        offsets = torch.tensor([0, *counts]).cumsum(0).tolist()
        pairs = zip(segmentations, offsets, strict=False)
        owner = torch.cat([(item.groups + offset).flatten() for item, offset in pairs])
        prediction = torch.cat([item.labels.flatten() for item in segmentations])
        target = torch.cat([item.flatten() for item in targets]).to(prediction)
        self.confusion += metrics.confusion_matrix(target, prediction, num_classes)
        truth, named = metrics.group_histograms(target, prediction, owner, offsets[-1], num_classes)
        self.oracle += metrics.oracle_confusion(truth)
        image_of_group = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(owner.device)
        pure, right = metrics.named_groups(truth, named, image_of_group)
        self.pure_groups += pure
        self.named_groups += right
        self.used_groups += int(torch.bincount(owner, minlength=offsets[-1]).count_nonzero())
        self.windows += offsets[-1] // groups
        self.images += len(segmentations)
        self.groups_per_window = groups


def evaluate(
    model: torch.nn.Module,
    dataset: SegmentationDataset,
    protocol: Protocol,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    limit: int | None = None,
    background_threshold: float | None = None,
    precision: str = "fp32",
    strict: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Segment `dataset` with `model` (moved to `device`) under `protocol` and score the result.

    batch_size: images read and decoded together; it changes speed and memory, not the result.
    limit: only the first images.
    background_threshold: instead of the protocol's own; refused where the dataset has no background.

    strict: an image that cannot be used is an error; otherwise it is left out and listed in the result, and
        only a dataset of which nothing is left is an error.

    The model's training mode is restored afterwards.
    """
    protocol = resolve_protocol(model, dataset, protocol, background_threshold)
    items = dataset.items[:limit]
    tally = Tally(len(dataset.class_names), device)
    left_out: list[dict[str, str]] = []
    start = time.perf_counter()
    with evaluating(model.to(device)):
        text = encode_protocol_classes(model, dataset.foreground, protocol)
        pairs = usable_pairs(
            read_ahead(dataset, items, 2 * batch_size), protocol, model, None if strict else left_out
        )
        while batch := list(islice(pairs, batch_size)):
            segmentations = segment_batch(
                model, [image for image, _ in batch], text, protocol, precision=precision
            )
            tally.add(segmentations, [target for _, target in batch], model.config.image.output_groups[-1])
            if progress is not None:
                progress(tally.images + len(left_out), len(items), metrics.mean_iou(tally.confusion))
    if not tally.images:
        reason = left_out[0]["reason"] if left_out else "the list of images is empty"
        raise UserError(f"dataset {dataset.name}: none of {len(items)} images could be used; first: {reason}")
    settings = {"device": str(device), "batch_size": batch_size, "limit": limit, "torch": torch.__version__}
    return summarise(dataset, protocol, tally, left_out, time.perf_counter() - start, settings)


def resolve_protocol(
    model: torch.nn.Module,
    dataset: SegmentationDataset,
    protocol: Protocol,
    background_threshold: float | None = None,
) -> Protocol:
    """Fill in what the protocol takes from the model and the dataset; see `Protocol.resolve`."""
    return protocol.resolve(
        dataset=dataset.name,
        background=dataset.background,
        image_size=model.config.image.image_size,
        threshold=background_threshold,
    )


def encode_protocol_classes(model: torch.nn.Module, entries: Sequence[str], protocol: Protocol) -> ClassText:
    """Text embeddings of class entries without background under a resolved protocol; NaN is an error."""
    each = protocol.normalise_each_template
    text = encode_classes(model, protocol.entries(entries), protocol.templates, normalise_each=each)
    if not text.embeddings.isfinite().all():
        raise UserError(
            "the text encoder gives NaN: these weights are damaged or diverged; use another checkpoint"
        )
    return text


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the former mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def read_ahead(
    dataset: SegmentationDataset, items: Sequence[Item], ahead: int
) -> Iterator[tuple[Item, tuple[Tensor, Tensor] | UserError]]:
    """Read pairs in order with a few threads, at most `ahead` beyond the one in use."""

    def read(item: Item) -> tuple[Tensor, Tensor] | UserError:
        try:
            return dataset.read(item)
        except UserError as error:
            return error

    with ThreadPoolExecutor(READERS) as pool:
        pending: deque = deque()
        try:
            for item in items:
                pending.append((item, pool.submit(read, item)))
                if len(pending) > ahead:
                    first, future = pending.popleft()
                    yield first, future.result()
            while pending:
                first, future = pending.popleft()
                yield first, future.result()
        finally:
            for _, future in pending:
                future.cancel()


def usable_pairs(
    pairs: Iterator[tuple[Item, tuple[Tensor, Tensor] | UserError]],
    protocol: Protocol,
    model: torch.nn.Module,
    left_out: list[dict[str, str]] | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs that can be scored; the others go to `left_out` with their reason, or are raised if None."""
    for item, result in pairs:
        try:
            if isinstance(result, UserError):
                raise result
            check_size(*result[1].shape, protocol, model.config.image.patch_size)
        except UserError as error:
            if left_out is None:
                raise
            left_out.append({"key": item.key, "reason": str(error)})
            continue
        yield result


def examples_picture(
    model: torch.nn.Module,
    dataset: SegmentationDataset,
    protocol: Protocol,
    *,
    count: int = 6,
    device: torch.device | str = "cpu",
    background_threshold: float | None = None,
    title: str = "",
) -> Image.Image:
    """`input | truth | prediction | final groups` for images spread evenly over the dataset."""
    protocol = resolve_protocol(model, dataset, protocol, background_threshold)
    step = max(1, len(dataset) // count)
    with evaluating(model.to(device)):
        text = encode_protocol_classes(model, dataset.foreground, protocol)
        pairs = usable_pairs(read_ahead(dataset, dataset.items[::step], count), protocol, model, [])
        pairs = list(islice(pairs, count))
        results = segment_batch(model, [image for image, _ in pairs], text, protocol)
    examples = [
        Example(
            *(part.cpu().numpy().astype(np.int64) for part in (image, result.labels, result.groups, target))
        )
        for (image, target), result in zip(pairs, results, strict=True)
    ]
    names = [synonyms(entry)[0] for entry in dataset.class_names]
    return grid_picture(examples, names, background=dataset.background, title=title)


def summarise(
    dataset: SegmentationDataset,
    protocol: Protocol,
    tally: Tally,
    left_out: Sequence[dict[str, str]],
    seconds: float,
    settings: dict[str, object],
) -> Evaluation:
    """Turn counts into the scores of the report."""
    confusion, oracle = tally.confusion.cpu(), tally.oracle.cpu()
    total = max(int(confusion.sum()), 1)
    columns = (
        metrics.class_iou(confusion).tolist(),
        metrics.class_accuracy(confusion).tolist(),
        (confusion.sum(dim=1) / total).tolist(),
        (confusion.sum(dim=0) / total).tolist(),
    )
    results = [
        ClassResult(synonyms(name)[0], *row) for name, *row in zip(dataset.class_names, *columns, strict=True)
    ]
    return Evaluation(
        dataset=dataset.name,
        images=tally.images,
        miou=metrics.mean_iou(confusion),
        pixel_accuracy=metrics.pixel_accuracy(confusion),
        mean_accuracy=metrics.class_accuracy(confusion).nanmean().item(),
        per_class=tuple(results),
        oracle_miou=metrics.mean_iou(oracle),
        largest_class=results[int(confusion.sum(dim=1).argmax())].name,
        miou_largest_class=metrics.mean_iou(metrics.largest_class_confusion(confusion)),
        groups_in_use=tally.used_groups / tally.windows,
        groups=tally.groups_per_window,
        pure_groups=tally.pure_groups,
        naming_accuracy=tally.named_groups / tally.pure_groups if tally.pure_groups else float("nan"),
        seconds=seconds,
        images_per_s=tally.images / seconds,
        confusion=tuple(map(tuple, confusion.tolist())),
        left_out=tuple(left_out),
        protocol=protocol.to_dict(),
        settings=dict(settings),
    )
