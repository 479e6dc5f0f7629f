"""The training loader: endless, shuffled batches of pixels and tokens, repeatable and resumable to the byte.

Everything random is a function of (seed, position), where the position counts samples over all ranks and
epochs. So the state of the loader is one number, and a run may even resume with another batch size.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from groupvit_fast.console import UserError
from groupvit_fast.data import sampling, text
from groupvit_fast.data.decode import (
    DecodeInput,
    ImageDecoder,
    default_threads,
    numbered_device,
    side_stream,
    undecodable,
    window_fractions,
)
from groupvit_fast.data.index import expand_shards
from groupvit_fast.data.reader import SampleReader

_log = logging.getLogger("groupvit_fast")
_QUEUE_DEPTH = 2  # finished batches kept ahead of the training step
_POLL_SECONDS = 0.1


@dataclass
class Batch:
    """One training batch of one rank."""

    images: torch.Tensor  # float32 [B, 3, H, W], ImageNet-normalised
    texts: torch.Tensor  # int64 [U, T]: the different token rows, T = longest of them, zero-padded
    text_index: torch.Tensor  # int64 [B, 1+K]: row of the caption, then rows of the K prompts


@dataclass
class _Plan:
    """A batch whose images are on their way through the decoder."""

    samples: np.ndarray
    words: np.ndarray
    captions: list[str]
    encoded: list[np.ndarray]


class TrainLoader:
    """Endless iterator over `Batch`, from webdataset tars of image-caption pairs.

    `shards` is anything `expand_shards` takes. `batch_size` is per rank. The order is a permutation of all
    samples over all shards for each epoch; ranks take turns in it, and an epoch ends in the middle of a batch
    when it has to, so each good sample is seen exactly once per epoch and no tail is dropped.

    `prompt_templates` is "clip", "noun" or a list of format strings, `noun_tags` a key of text.NOUN_TAGS.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        *,
        batch_size: int,
        image_size: int,
        num_prompts: int = 0,
        context_length: int = text.CONTEXT_LENGTH,
        prompt_templates: str | Sequence[str] = "clip",
        noun_tags: str = "official",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        num_threads: int | None = None,
        min_crop: float = 0.08,
        flip: bool = True,
        cache_dir: Path | None = None,
        quiet: bool = False,
    ):
        self.batch_size, self.image_size = batch_size, image_size
        self.num_prompts, self.context_length = num_prompts, context_length
        self.templates = text.prompt_templates(prompt_templates)
        self.noun_tags = text.check_noun_tags(noun_tags)
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.device, self.num_threads = numbered_device(device), num_threads or default_threads()
        self.min_crop, self.flip = min_crop, flip
        self.reader = SampleReader(expand_shards(shards), cache_dir, quiet)
        self._position = 0  # samples handed out so far, over all ranks and epochs
        self._orders: OrderedDict[int, np.ndarray] = OrderedDict()
        self._check()

    def _check(self) -> None:
        if self.batch_size < 1 or self.image_size < 1 or self.num_prompts < 0:
            raise UserError("batch size and image size must be at least 1, the number of prompts at least 0")
        if not 0 < self.min_crop <= 1:
            raise UserError(f"min_crop {self.min_crop} must lie in (0, 1]")
        if not 0 <= self.rank < self.world_size:
            raise UserError(f"rank {self.rank} does not fit a world size of {self.world_size}")
        rejected = [entry for index in self.reader.indexes for entry in index.rejected]
        if rejected:
            total = len(rejected) + len(self.reader)
            _log.warning("%d of %d samples left out, first: %s (%s)", len(rejected), total, *rejected[0])
        if len(self.reader) < self._stride:
            raise UserError(
                f"the shards hold {len(self.reader)} usable samples, fewer than one step of {self._stride}; "
                "use a smaller batch size or more shards"
            )

    @property
    def _stride(self) -> int:
        return self.batch_size * self.world_size

    @property
    def samples_per_epoch(self) -> int:
        """Usable samples in all shards, over all ranks."""
        return len(self.reader)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of this rank in one epoch."""
        return len(self.reader) // self._stride

    @property
    def bad_samples(self) -> int:
        """Samples that passed the index but could not be decoded, and are no longer delivered."""
        return len(self.reader.quarantined)

    def state_dict(self) -> dict[str, Any]:
        """Plain values that resume right after the last batch handed out."""
        return {
            "version": 1,
            "position": self._position,
            "seed": self.seed,
            "samples": len(self.reader),
            "fingerprint": self.reader.fingerprint(),
            "quarantined": self.reader.quarantined,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; the shards and the seed must be those it was written with."""
        if state.get("version") != 1:
            raise UserError(f"loader state of version {state.get('version')} cannot be read; expected 1")
        if state["seed"] != self.seed:
            raise UserError(
                f"the saved run has seed {state['seed']}, this one {self.seed}; use the same seed"
            )
        if state["fingerprint"] != self.reader.fingerprint():
            raise UserError(
                f"the shards are not those of the saved run ({state['samples']} samples then, "
                f"{len(self.reader)} now); use the same shards or start anew"
            )
        self._position = int(state["position"])
        for sample in state["quarantined"]:
            self.reader.quarantine(sample)

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current position on, made by a background thread that ends with the iterator."""
        ready: queue.Queue = queue.Queue(maxsize=_QUEUE_DEPTH)
        stop = threading.Event()
        # Not a daemon: Python then waits for it at exit, and it notices that the main thread has ended.
        worker = threading.Thread(target=self._work, args=(ready, stop), name="train-loader")
        worker.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                self._position += self._stride
                yield _for_this_stream(item)
        finally:
            stop.set()
            worker.join()

    def _work(self, ready: queue.Queue, stop: threading.Event) -> None:
        try:
            with side_stream(self.device):
                for batch in self._batches(self._position):
                    if self.device.type == "cuda":
                        torch.cuda.current_stream(self.device).synchronize()
                    if not _put(ready, batch, stop):
                        return
        except BaseException as error:  # handed to the training thread, which raises it
            _put(ready, error, stop)
        finally:
            self.reader.close()

    def _batches(self, position: int) -> Iterator[Batch]:
        """Decode, encode the texts meanwhile, and start over without the culprit when an image breaks."""
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
                position += self._stride

    def _open_decoder(self, position: int, plans: deque[_Plan]) -> ImageDecoder:
        positions = iter(range(position, 2**62, self._stride))

        def source() -> DecodeInput:
            plan = self._plan(next(positions))
            plans.append(plan)
            return self._decode_input(plan)

        return ImageDecoder(
            source,
            batch_size=self.batch_size,
            image_size=self.image_size,
            device=self.device,
            num_threads=self.num_threads,
        )

    def _plan(self, position: int) -> _Plan:
        first = position + self.rank * self.batch_size
        samples = self.reader.usable(self._samples_at(first))
        encoded, captions = self.reader.read(samples)
        return _Plan(samples, sampling.draws(self.seed, first, self.batch_size), captions, encoded)

    def _samples_at(self, first: int) -> np.ndarray:
        """Sample numbers of batch_size positions from `first` on, across an epoch's end if need be."""
        epoch, start = divmod(first, len(self.reader))
        samples = self._order(epoch)[start : start + self.batch_size]
        if len(samples) < self.batch_size:
            samples = np.concatenate([samples, self._order(epoch + 1)[: self.batch_size - len(samples)]])
        return samples

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders[epoch] = sampling.epoch_order(len(self.reader), self.seed, epoch)
            while len(self._orders) > 2:
                self._orders.popitem(last=False)
        return self._orders[epoch]

    def _decode_input(self, plan: _Plan) -> DecodeInput:
        width, height = self.reader.width[plan.samples], self.reader.height[plan.samples]
        windows = sampling.crop_windows(width, height, plan.words, self.min_crop)
        flips = sampling.uniform(plan.words[:, sampling.FLIP_DRAW]) < 0.5
        mirror = (flips & self.flip).astype(np.int32)
        return DecodeInput(plan.encoded, *window_fractions(windows, width, height), mirror)

    def _assemble(self, images: torch.Tensor, plan: _Plan) -> Batch:
        rows = []
        for caption, word in zip(plan.captions, plan.words[:, sampling.TEXT_DRAW].tolist(), strict=True):
            caption = text.clean(caption)
            rows.append([caption])
            if self.num_prompts:
                rng = random.Random(word)
                rows[-1] += text.draw_prompts(caption, self.num_prompts, rng, self.templates, self.noun_tags)
        texts, text_index = text.unique_rows(rows, self.context_length)
        return Batch(images, texts.to(images.device), text_index.to(images.device))

    def _quarantine(self, plans: deque[_Plan], position: int, error: RuntimeError) -> None:
        """Find the images on their way that DALI cannot decode and stop delivering them."""
        pairs = [pair for plan in plans for pair in zip(plan.samples.tolist(), plan.encoded, strict=True)]
        found = [pairs[number][0] for number in undecodable([image for _, image in pairs], self.device)]
        if not found:
            raise error
        for sample in found:
            self.reader.quarantine(sample)
            _log.warning("%s cannot be decoded; the next good sample replaces it", self.reader.name(sample))
        bad = self.reader.quarantined
        if len(bad) > max(16, position // 100):
            names = ", ".join(map(self.reader.name, bad[:10]))
            raise UserError(f"{len(bad)} images, over 1 % of those read, cannot be decoded; repair {names}")


def _put(ready: queue.Queue, item: Batch | BaseException, stop: threading.Event) -> bool:
    """Hand over `item`; False when the consumer is gone."""
    while not stop.is_set() and threading.main_thread().is_alive():
        try:
            ready.put(item, timeout=_POLL_SECONDS)
            return True
        except queue.Full:
            continue
    return False


def _for_this_stream(batch: Batch) -> Batch:
    """Tell torch's GPU allocator that the training stream uses these tensors, which another thread made."""
    if batch.images.is_cuda:
        for tensor in (batch.images, batch.texts, batch.text_index):
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return batch
