"""Reading a dataset ahead of the encoder, in order, and cutting it into batches that fit into memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from groupvit_fast.console import UserError
from groupvit_fast.segmentation.datasets import Item, SegmentationDataset

READERS = 2
PIXELS_AHEAD = 1 << 24
"""Reading pauses while this many pixels wait; at least one image does."""
PIXELS_PER_BATCH = 1 << 23
"""A batch ends at this many pixels, read or after resizing: 8 megapixels are 32 photos at 448 x 597."""

Pair = tuple[Tensor, Tensor]
Read = tuple[int, Item, Pair | UserError]


def read_ahead(dataset: SegmentationDataset, items: Sequence[tuple[int, Item]], ahead: int) -> Iterator[Read]:
    """Read numbered items in order with a few threads, at most `ahead` beyond the one in use."""

    waiting: dict[int, int] = {}  # pixels of each pair that was read and not yet taken

    def read(number: int, item: Item) -> Pair | UserError:
        try:
            pair = dataset.read(item)
        except UserError as error:
            return error
        waiting[number] = pair[1].numel()
        return pair

    pending: deque[tuple[int, Item, Future]] = deque()
    rest = iter(items)
    with ThreadPoolExecutor(READERS) as pool:
        try:
            while True:
                while len(pending) <= ahead and sum(list(waiting.values())) < PIXELS_AHEAD:
                    number, item = next(rest, (None, None))
                    if item is None:
                        break
                    pending.append((number, item, pool.submit(read, number, item)))
                if not pending:
                    return
                number, item, future = pending.popleft()
                result = future.result()
                waiting.pop(number, None)
                yield number, item, result
        finally:
            for *_, future in pending:
                future.cancel()


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
