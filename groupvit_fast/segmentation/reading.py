"""Reading a dataset ahead of the encoder, in order, and cutting it into batches that fit into memory."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from torch import Tensor

from groupvit_fast.console import UserError
from groupvit_fast.segmentation.datasets import Item, SegmentationDataset

MOST_READERS = 8
PIXELS_AHEAD = 1 << 24
"""Reading pauses while this many pixels wait; at least one image does."""
PIXELS_PER_BATCH = 1 << 23
"""A batch ends at this many pixels, read or after resizing: 8 megapixels are 32 photos at 448 x 597."""

Pair = tuple[Tensor, Tensor]
Read = tuple[int, Item, Pair | UserError]


class Budget:
    """Holds readers back while many pixels wait to be taken; the next item in order is always let through."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.waiting: dict[int, int] = {}  # pixels of what was read and not yet taken, by place in the order
        self.wanted = 0
        self.closed = False

    def wait(self, place: int) -> None:
        """Return when item `place` may be read."""
        with self.changed:
            self.changed.wait_for(
                lambda: self.closed or place <= self.wanted or sum(self.waiting.values()) < PIXELS_AHEAD
            )

    def update(self, **changes: int | bool) -> None:
        """Set `wanted` or `closed`."""
        with self.changed:
            self.__dict__.update(changes)
            self.changed.notify_all()

    def put(self, place: int, pixels: int) -> None:
        with self.changed:
            self.waiting[place] = pixels

    def take(self, place: int) -> None:
        with self.changed:
            self.waiting.pop(place, None)
            self.changed.notify_all()


def read_ahead(dataset: SegmentationDataset, items: Sequence[tuple[int, Item]], ahead: int) -> Iterator[Read]:
    """Read numbered items in order with a few threads, at most `ahead` beyond the one in use."""
    budget = Budget()

    def read(place: int, item: Item) -> Pair | UserError:
        budget.wait(place)
        try:
            pair = dataset.read(item)
        except UserError as error:
            return error
        budget.put(place, pair[1].numel())
        return pair

    pending: deque[tuple[int, int, Item, Future]] = deque()
    rest = enumerate(items)
    with ThreadPoolExecutor(readers()) as pool:
        try:
            while True:
                for place, (number, item) in islice(rest, ahead + 1 - len(pending)):
                    pending.append((place, number, item, pool.submit(read, place, item)))
                if not pending:
                    return
                place, number, item, future = pending.popleft()
                budget.update(wanted=place)
                result = future.result()
                budget.take(place)
                yield number, item, result
        finally:
            for *_, future in pending:
                future.cancel()
            budget.update(closed=True)


def readers() -> int:
    """Threads that read: the cores of this process, which the processes of a machine share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(MOST_READERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def batches(
    pairs: Iterator[tuple[int, Item, Pair]], most: int, pixels_after_resizing: int
) -> Iterator[list[tuple[int, Item, Pair]]]:
    """Lists of at most `most` pairs and not much more than PIXELS_PER_BATCH pixels."""
    batch, pixels = [], 0
    for pair in pairs:
        batch.append(pair)
        pixels += max(pair[2][1].numel(), pixels_after_resizing)
        if len(batch) >= most or pixels >= PIXELS_PER_BATCH:
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch
