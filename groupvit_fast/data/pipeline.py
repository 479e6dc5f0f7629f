"""The training loader: endless, shuffled batches of pixels and tokens, resumable to the byte."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from groupvit_fast.console import UserError
from groupvit_fast.data import text
from groupvit_fast.data.augment import Augmentation
from groupvit_fast.data.batches import Batch, BatchMaker, BatchOptions
from groupvit_fast.data.decode import default_threads, numbered_device, side_stream
from groupvit_fast.data.index import expand_shards
from groupvit_fast.data.reader import SampleReader
from groupvit_fast.data.remote import ShardCache

__all__ = ["Batch", "TrainLoader"]

_log = logging.getLogger("groupvit_fast")
_QUEUE_DEPTH = 2  # finished batches kept ahead of the training step
_POLL_SECONDS = 0.1


class TrainLoader:
    """Endless iterator over `Batch`, from webdataset tars of image-caption pairs.

    `shards` is anything `expand_shards` takes. `batch_size` is per rank. The order is a permutation of all
    samples over all shards for each epoch; ranks take turns in it, and an epoch ends in the middle of a batch
    when it has to, so each good sample is seen exactly once per epoch and no tail is dropped.

    `weights` has one number for each item of `shards`: how often an epoch shows each of its samples on
    average. URLs are downloaded into `shard_cache`; where that cannot hold them all, samples are shuffled
    over as many shards as it can. `quarantine_file` gets a line for each sample that turns out broken.

    `prompt_templates` is "clip", "noun" or a list of format strings, `noun_tags` a key of text.NOUN_TAGS.
    `prompt_fill` is "caption" or "noun", see text.draw_prompts.
    `cache_dir` overrides where the shard indexes are kept.
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
        prompt_fill: str = "caption",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        num_threads: int | None = None,
        min_crop: float = 0.08,
        flip: bool = True,
        augment: Augmentation | None = None,
        weights: Sequence[float] | None = None,
        allow_missing: bool = False,
        shard_cache: ShardCache | None = None,
        quarantine_file: Path | None = None,
        cache_dir: Path | None = None,
        quiet: bool = False,
    ):
        self.options = BatchOptions(
            batch_size=batch_size,
            image_size=image_size,
            num_prompts=num_prompts,
            context_length=context_length,
            templates=text.prompt_templates(prompt_templates),
            noun_tags=text.check_noun_tags(noun_tags),
            prompt_fill=prompt_fill,
            seed=seed,
            rank=rank,
            world_size=world_size,
            device=numbered_device(device),
            num_threads=num_threads or default_threads(),
            min_crop=min_crop,
            flip=flip,
            augment=augment or Augmentation(),
        )
        specs = [shards] if isinstance(shards, (str, Path)) else list(shards)
        sources = [expand_shards(spec, remote=True, allow_missing=allow_missing) for spec in specs or [[]]]
        every = [shard for source in sources for shard in source]
        self.reader = SampleReader(every, cache_dir, quiet, cache=shard_cache, allow_missing=allow_missing)
        self.weights = [] if weights is None else [float(weight) for weight in weights]
        weighted = self._weighted([len(source) for source in sources])
        self._maker = BatchMaker(self.reader, self.options, weighted, quarantine_file)
        self._position = 0  # samples handed out so far, over all ranks and epochs
        self._check_samples()

    def _weighted(self, shard_counts: list[int]) -> list[tuple[int, float]] | None:
        """(samples, weight) of each source; None where the weights change nothing."""
        if self.weights and len(self.weights) != len(shard_counts):
            raise UserError(
                f"{len(self.weights)} data weights for {len(shard_counts)} sources; give one for each"
            )
        if not all(weight >= 0 and weight < float("inf") for weight in self.weights):
            raise UserError(f"data weights {self.weights} must be numbers of 0 or more")
        if all(weight == 1 for weight in self.weights):
            return None
        source_of = np.searchsorted(np.cumsum(shard_counts), self.reader.given, side="right")
        sizes = np.bincount(source_of, np.diff(self.reader.shard_start), len(shard_counts)).astype(int)
        return list(zip(sizes.tolist(), self.weights, strict=True))

    def _check_samples(self) -> None:
        rejected = [entry for index in self.reader.indexes for entry in index.rejected]
        if rejected:
            total = len(rejected) + len(self.reader)
            _log.warning("%d of %d samples left out, first: %s (%s)", len(rejected), total, *rejected[0])
        if self.samples_per_epoch < self.options.stride:
            raise UserError(
                f"the shards hold {self.samples_per_epoch} usable samples, fewer than one step of "
                f"{self.options.stride}; use a smaller batch size or more shards"
            )

    @property
    def samples_per_epoch(self) -> int:
        """Usable samples in all shards, over all ranks; with weights, what an epoch shows of them."""
        return self._maker.epoch_length

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of this rank in one epoch."""
        return self.samples_per_epoch // self.options.stride

    @property
    def bad_samples(self) -> int:
        """Samples that passed the index but could not be decoded, and are no longer delivered."""
        return len(self.reader.quarantined)

    def sample_names(self) -> list[str]:
        """Where the samples of the last batch handed out lie, for messages."""
        position = self._position - self.options.stride
        # a maker of its own: the background thread uses the other one
        maker = BatchMaker(self.reader, self.options, self._maker.sources)
        samples = maker.samples_at(position) if position >= 0 else []
        return [self.reader.name(sample) for sample in self.reader.usable(np.asarray(samples, np.int64))]

    def state_dict(self) -> dict[str, Any]:
        """Plain values that resume right after the last batch handed out."""
        return {
            "version": 1,
            "position": self._position,
            "seed": self.options.seed,
            "samples": len(self.reader),
            "fingerprint": self.reader.fingerprint,
            "weights": self.weights,
            "window": self.reader.window,
            "quarantined": self.reader.quarantined,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state` with the next iterator; seed and shards must be those it was written with.

        The batch size and the number of ranks may differ: the order of the samples stays.
        """
        if state.get("version") != 1:
            raise UserError(f"loader state of version {state.get('version')} cannot be read; expected 1")
        if state["seed"] != self.options.seed:
            raise UserError(
                f"the saved run has seed {state['seed']}, this one {self.options.seed}; use the same seed"
            )
        if state["fingerprint"] != self.reader.fingerprint:
            raise UserError(
                f"the shards are not those of the saved run ({state['samples']} samples then, "
                f"{len(self.reader)} now); use the same shards or start anew"
            )
        if state.get("weights", []) != self.weights:
            raise UserError(
                f"the saved run has data weights {state.get('weights')}, this one {self.weights}; "
                "use the same or start anew"
            )
        if state.get("window") != self.reader.window:
            raise UserError(
                "the saved run has another --shard-cache-gb, which its order depends on; use the same"
            )
        self._position = int(state["position"])
        for sample in state["quarantined"]:
            self.reader.quarantine(sample)

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current position on, made by a background thread that ends with the iterator."""
        ready: queue.Queue = queue.Queue(maxsize=_QUEUE_DEPTH)
        stop = threading.Event()
        # Not a daemon: Python then waits for it at exit, and it notices that the main thread has ended.
        worker = threading.Thread(target=self._work, args=(self._position, ready, stop), name="train-loader")
        worker.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                self._position += self.options.stride
                yield _for_this_stream(item)
        finally:
            stop.set()
            worker.join()

    def _work(self, position: int, ready: queue.Queue, stop: threading.Event) -> None:
        device = self.options.device
        try:
            with side_stream(device):
                for batch in self._maker.batches(position):
                    if device.type == "cuda":
                        torch.cuda.current_stream(device).synchronize()
                    if not _put(ready, batch, stop):
                        return
        except BaseException as error:  # handed to the training thread, which raises it
            _put(ready, error, stop)
        finally:
            self.reader.close()


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
