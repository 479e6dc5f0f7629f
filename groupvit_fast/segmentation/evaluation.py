"""Score a model on a dataset: read ahead, segment in batches, add up counts, report once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from groupvit_fast.console import UserError
from groupvit_fast.model.linear import prepacked
from groupvit_fast.segmentation import metrics
from groupvit_fast.segmentation.batch import check_size, segment_batch
from groupvit_fast.segmentation.datasets import Item, SegmentationDataset
from groupvit_fast.segmentation.partial import PartialResults, Progress, fingerprint
from groupvit_fast.segmentation.pictures import Example, grid_picture
from groupvit_fast.segmentation.prompts import ClassText, encode_classes, synonyms
from groupvit_fast.segmentation.protocols import Protocol
from groupvit_fast.segmentation.reading import Pair, Read, batches, read_ahead
from groupvit_fast.segmentation.report import Evaluation, summarise
from groupvit_fast.segmentation.tally import Tally

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
MOST_READ_AHEAD = 128
SAVE_EVERY = 20.0
"""Seconds between two partial results."""

ShowProgress = Callable[[int, int | None, float], None]
"""Called after each batch with the images done, their total if known, and the score so far."""


class Ranks(NamedTuple):
    """Processes that share an evaluation: `gather` brings the values of all to the first, else []."""

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]


ALONE = Ranks()


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
    details: bool = False,
    strict: bool = False,
    progress: ShowProgress | None = None,
    partial: Path | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation | None:
    """Segment `dataset` with `model` (moved to `device`) under `protocol` and score the result.

    batch_size: images read and decoded together, fewer where they are large; it changes speed and memory,
        not the result.
    limit: only the first images.
    background_threshold: instead of the protocol's own; refused where the dataset has no background.
    precision: "bf16" runs the encoder in bfloat16, which moves some labels.
    details: also boundary IoU and the oracle of earlier grouping stages, which take time.
    strict: an image that cannot be used is an error; otherwise it is left out and listed in the result, and
        only a dataset of which nothing is left is an error.
    partial: a folder for partial results. An evaluation that was killed goes on from there and has the same
        counts in the end. The folder stays, with all counts in it; remove it once the result is safe.
    ranks: other processes that call this too. Each image is counted by one of them, whatever their number;
        the first returns the result, the others None.

    The model's training mode is restored afterwards.
    """
    run = Run(
        model.to(device), dataset, resolve_protocol(model, dataset, protocol, background_threshold),
        device=torch.device(device), batch_size=batch_size, limit=limit, precision=precision,
        details=details, strict=strict, ranks=ranks,
    )  # fmt: skip
    run.resume(partial)
    with evaluating(model, precision):
        run.count(progress)
    states = ranks.gather(run.progress.to_bytes(""))
    if not states:
        return None
    total = run.new_progress("cpu")
    for state in states:
        total.merge(Progress.from_bytes(state, ""))
    run.progress = total
    run.require_images(total.tally.scalars["images"])
    return summarise(dataset, run.protocol, total, model.config.image.output_groups, run.settings())


@dataclass
class Run:
    """One process's part of an evaluation."""

    model: torch.nn.Module
    dataset: SegmentationDataset
    protocol: Protocol
    device: torch.device
    batch_size: int
    limit: int | None = None
    precision: str = "fp32"
    details: bool = False
    strict: bool = False
    ranks: Ranks = ALONE
    partial: PartialResults | None = None
    items: list[tuple[int, Item]] = field(init=False)
    progress: Progress = field(init=False)

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UserError(f"precision {self.precision!r}: choose one of {', '.join(PRECISIONS)}")
        self.items = list(enumerate(self.dataset.items[: self.limit]))
        self.total = len(self.items)
        self.progress = self.new_progress(self.device)

    def new_progress(self, device: torch.device | str) -> Progress:
        stages = len(self.model.config.image.output_groups) if self.details else 1
        classes = len(self.dataset.class_names)
        tally = Tally(classes, stages=stages, details=self.details, images=self.total, device=device)
        return Progress(tally)

    def settings(self) -> dict[str, Any]:
        """What the result tells beside protocol and dataset."""
        names = ("batch_size", "limit", "precision")
        known = {name: getattr(self, name) for name in names}
        known["split"] = self.dataset.split
        return {"device": str(self.device), **known, "processes": self.ranks.size, "torch": torch.__version__}

    def resume(self, folder: Path | None) -> None:
        """Take over the partial results in `folder`, and keep to this process's share of the rest."""
        if folder is not None:
            where = self.dataset.name, str(self.dataset.root), self.dataset.class_names
            what = *where, self.protocol.to_dict(), self.precision, self.details
            keys = [item.key for _, item in self.items]
            self.partial = PartialResults(folder, fingerprint(self.model, keys, {"what": what}))
            before = self.partial.load()
            self.ranks.gather(None)  # nobody writes before everybody has read
            if before is not None:
                self.items = [pair for pair in self.items if pair[0] not in before.done]
            if self.ranks.rank == 0:
                if before is not None:
                    self.progress.merge(before)
                self.partial.save(self.progress, 0)
                self.partial.keep_only(0)
            self.ranks.gather(None)
        self.items = self.items[self.ranks.rank :: self.ranks.size]

    def count(self, show: ShowProgress | None) -> None:
        """Segment this process's images and count."""
        done = self.progress
        start = saved = time.perf_counter()
        before, known = done.seconds, len(done.done)
        text = encode_protocol_classes(self.model, self.dataset.foreground, self.protocol)
        ahead = min(2 * self.batch_size, MOST_READ_AHEAD)
        pairs = self.usable(read_ahead(self.dataset, self.items, ahead))
        for batch in batches(pairs, self.batch_size, self.protocol.short_side**2):
            numbers, images, targets = zip(*((number, *pair) for number, _, pair in batch), strict=True)
            segmentations = segment_batch(
                self.model, images, text, self.protocol, precision=self.precision, stages=self.details
            )
            done.tally.add(numbers, segmentations, targets, self.model.config.image.output_groups[-1])
            done.done.update(numbers)
            done.seconds = before + time.perf_counter() - start
            if show is not None:
                seen = known + (len(done.done) - known) * self.ranks.size
                show(min(seen, self.total), self.total, metrics.iou(done.tally.counts).nanmean().item())
            if self.partial is not None and time.perf_counter() - saved > SAVE_EVERY:
                self.partial.save(done, self.ranks.rank)
                saved = time.perf_counter()
        done.seconds = before + time.perf_counter() - start
        if self.partial is not None:
            self.partial.save(done, self.ranks.rank)

    def usable(self, read: Iterator[Read]) -> Iterator[tuple[int, Item, Pair]]:
        """The pairs that can be scored; the others are noted with their reason, or raised if strict."""
        for number, item, result in read:
            try:
                yield number, item, usable_pair(result, self.protocol, self.model)
            except UserError as error:
                if self.strict:
                    raise
                self.progress.left_out[number] = {"key": item.key, "reason": str(error)}
                self.progress.done.add(number)

    def require_images(self, count: int) -> None:
        """Complain if no image could be used."""
        if count == 0:
            left_out = self.progress.left_out
            reason = left_out[min(left_out)]["reason"] if left_out else "the list of images is empty"
            raise UserError(
                f"dataset {self.dataset.name}: none of {self.total} images could be used; first: {reason}"
            )


def usable_pair(result: Pair | UserError, protocol: Protocol, model: torch.nn.Module) -> Pair:
    """The image and its labels; UserError if they could not be read or are too small for the model."""
    if isinstance(result, UserError):
        raise result
    check_size(*result[1].shape, protocol, model.config.image.patch_size)
    return result


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
def evaluating(model: torch.nn.Module, precision: str = "fp32") -> Iterator[None]:
    """Evaluation mode inside, the former mode afterwards; weights must not change inside (`prepacked`)."""
    training = model.training
    model.eval()
    try:
        with prepacked(model, PRECISIONS[precision]):
            yield
    finally:
        model.train(training)


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
        pairs = []
        for _, _, result in read_ahead(dataset, list(enumerate(dataset.items))[::step], count):
            with suppress(UserError):
                pairs.append(usable_pair(result, protocol, model))
            if len(pairs) == count:
                break
        results = segment_batch(model, [image for image, _ in pairs], text, protocol)
    examples = [
        Example(
            *(part.cpu().numpy().astype(np.int64) for part in (image, result.labels, result.groups, target))
        )
        for (image, target), result in zip(pairs, results, strict=True)
    ]
    names = [synonyms(entry)[0] for entry in dataset.class_names]
    return grid_picture(examples, names, background=dataset.background, title=title)
