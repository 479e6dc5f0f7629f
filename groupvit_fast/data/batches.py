"""Making the batch at any position: which samples, which crops and flips, which prompts.

A position counts samples over all ranks and epochs. Everything random is a function of (seed, position), so
the batch at a position is the same in every run, and a broken image changes nothing but its own place.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import random
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from groupvit_fast.console import UserError
from groupvit_fast.data import sampling, text
from groupvit_fast.data.augment import Augmentation
from groupvit_fast.data.decode import DecodeInput, ImageDecoder, undecodable, window_fractions
from groupvit_fast.data.reader import SampleReader

_log = logging.getLogger("groupvit_fast")
_TOLERATED = 16  # broken images that may always be met; beyond, 1 % of the samples read
_TOLERATED_PERCENT = 1
_FETCH_AHEAD = 32  # batches between asking for a remote shard and needing it


@dataclass
class Batch:
    """One training batch of one rank."""

    images: torch.Tensor  # float32 [B, 3, H, W], ImageNet-normalised
    texts: torch.Tensor  # int64 [U, T]: the different token rows, T = longest of them, zero-padded
    text_index: torch.Tensor  # int64 [B, 1+K]: row of the caption, then rows of the K prompts


@dataclass(frozen=True)
class BatchOptions:
    """Everything that decides what a batch looks like, apart from the shards."""

    batch_size: int
    image_size: int
    num_prompts: int
    context_length: int
    templates: tuple[str, ...]
    noun_tags: str
    prompt_fill: str
    seed: int
    rank: int
    world_size: int
    device: torch.device
    num_threads: int
    min_crop: float
    flip: bool
    augment: Augmentation

    def __post_init__(self):
        if self.batch_size < 1 or self.image_size < 1 or self.num_prompts < 0:
            raise UserError("batch size and image size must be at least 1, the number of prompts at least 0")
        if not 0 < self.min_crop <= 1:
            raise UserError(f"min_crop {self.min_crop} must lie in (0, 1]")
        if not 0 <= self.rank < self.world_size:
            raise UserError(f"rank {self.rank} does not fit a world size of {self.world_size}")

    @property
    def stride(self) -> int:
        """Samples in one step over all ranks."""
        return self.batch_size * self.world_size


@dataclass
class _Plan:
    """A batch whose images are on their way through the decoder."""

    samples: np.ndarray
    first: int  # position of the first sample
    words: np.ndarray
    captions: list[str]
    nouns: list[list[str] | None]  # those that the index has
    encoded: list[np.ndarray]


class BatchMaker:
    """Makes the batches of one rank; decodes the next images while it encodes the texts of these.

    `sources` is a list of (samples, weight), in the order of the reader; none: each sample once an epoch.
    """

    def __init__(
        self,
        reader: SampleReader,
        options: BatchOptions,
        sources: Sequence[tuple[int, float]] | None = None,
        quarantine_file: Path | None = None,
    ):
        self.reader, self.options, self.sources = reader, options, sources
        self._quarantine_file = quarantine_file
        self._sizes, self._weights = zip(*sources, strict=True) if sources else ((len(reader),), None)
        self.epoch_length = sum(itertools.starmap(sampling.epoch_share, sources)) if sources else len(reader)
        self._orders: OrderedDict[int, np.ndarray] = OrderedDict()

    def batches(self, position: int) -> Iterator[Batch]:
        """Batches from `position` on, for ever; starts over without the culprit when an image breaks."""
        while True:
            plans: deque[_Plan] = deque()
            decoder = self._open_decoder(position, plans)
            while True:
                try:
                    images = decoder.next()
                except RuntimeError as error:
                    del decoder
                    self._quarantine(plans, position, error)
                    break
                yield self._assemble(images, plans.popleft())
                position += self.options.stride

    def samples_at(self, position: int) -> np.ndarray:
        """Sample numbers of this rank's batch at `position`, across an epoch's end if need be."""
        size = self.options.batch_size
        epoch, start = divmod(position + self.options.rank * size, self.epoch_length)
        samples = self._order(epoch)[start : start + size]
        while len(samples) < size:
            epoch += 1
            samples = np.concatenate([samples, self._order(epoch)[: size - len(samples)]])
        return samples

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders[epoch] = self._make_order(epoch)
            while len(self._orders) > 2:
                self._orders.popitem(last=False)
        return self._orders[epoch]

    def _make_order(self, epoch: int) -> np.ndarray:
        reader, seed = self.reader, self.options.seed
        if self._weights is None:
            order = sampling.epoch_order(len(reader), seed, epoch)
        else:
            order = sampling.weighted_order(self._sizes, self._weights, seed, epoch)
        if reader.window is None:
            return order
        shards = reader.shard_of(order)
        return sampling.window_order(order, shards, reader.shard_bytes, reader.window, seed, epoch)

    def _open_decoder(self, position: int, plans: deque[_Plan]) -> ImageDecoder:
        positions = iter(range(position, 2**62, self.options.stride))

        def source() -> DecodeInput:
            plans.append(self._plan(next(positions)))
            return self._decode_input(plans[-1])

        return ImageDecoder(
            source,
            batch_size=self.options.batch_size,
            image_size=self.options.image_size,
            layers=self.options.augment.layers,
            device=self.options.device,
            num_threads=self.options.num_threads,
        )

    def _plan(self, position: int) -> _Plan:
        options = self.options
        samples = self.reader.usable(self.samples_at(position))
        if self.reader.window is not None:
            self.reader.fetch_ahead(self.samples_at(position + _FETCH_AHEAD * options.stride))
        first = position + options.rank * options.batch_size
        words = sampling.draws(options.seed, first, options.batch_size)
        encoded, captions = self.reader.read(samples)
        nouns = self.reader.nouns(samples, options.noun_tags)
        return _Plan(samples, first, words, captions, nouns, encoded)

    def _decode_input(self, plan: _Plan) -> DecodeInput:
        width, height = self.reader.width[plan.samples], self.reader.height[plan.samples]
        windows = sampling.crop_windows(width, height, plan.words, self.options.min_crop)
        flips = sampling.uniform(plan.words[:, sampling.FLIP_DRAW]) < 0.5
        mirror = (flips & self.options.flip).astype(np.int32)
        size = self.options.image_size
        augmented = self.options.augment.draw(self.options.seed, plan.first, len(plan.samples), size)
        return DecodeInput(plan.encoded, *window_fractions(windows, width, height), mirror, *augmented)

    def _assemble(self, images: torch.Tensor, plan: _Plan) -> Batch:
        options = self.options
        rows = []
        draws = plan.words[:, sampling.TEXT_DRAW].tolist()
        for caption, nouns, word in zip(plan.captions, plan.nouns, draws, strict=True):
            caption = text.clean(caption)
            rows.append([caption])
            if options.num_prompts:
                rng = random.Random(word)
                rows[-1] += text.draw_prompts(
                    caption,
                    options.num_prompts,
                    rng,
                    options.templates,
                    options.noun_tags,
                    options.prompt_fill,
                    nouns,
                )
        texts, text_index = text.unique_rows(rows, options.context_length)
        # Texts stay in host memory: training reads their lengths, and would have to wait for a GPU.
        return Batch(images, texts, text_index)

    def _quarantine(self, plans: deque[_Plan], position: int, error: RuntimeError) -> None:
        """Find the images on their way that DALI cannot decode and stop delivering them."""
        pairs = [pair for plan in plans for pair in zip(plan.samples.tolist(), plan.encoded, strict=True)]
        found = undecodable([image for _, image in pairs], self.options.device)
        if not found:
            raise error
        for sample in sorted({pairs[number][0] for number in found}):
            self.reader.quarantine(sample)
            name = self.reader.name(sample)
            _log.warning("%s cannot be decoded; the next good sample replaces it", name)
            if self._quarantine_file is not None:
                _add_line(self._quarantine_file, name)
        bad = self.reader.quarantined
        if len(bad) > max(_TOLERATED, position * _TOLERATED_PERCENT // 100):
            names = ", ".join(map(self.reader.name, bad[:10]))
            raise UserError(f"{len(bad)} images, over 1 % of those read, cannot be decoded; repair {names}")


def _add_line(path: Path, line: str) -> None:
    """Append a line unless the file has it; several processes may do so at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8", errors="surrogateescape") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if line not in file.read().split("\n"):
            file.write(line + "\n")
