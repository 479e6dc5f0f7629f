"""Decoding every image of a shard, which finds what a look at its ends cannot."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import torch

from groupvit_fast.data.decode import DecodeInput, ImageDecoder, default_threads, undecodable
from groupvit_fast.data.scan import ShardIndex

_MOST_PIXELS = 1 << 26  # decoded at a time: 200 MB
_MOST_IMAGES = 64
_CPU = torch.device("cpu")


def undecodable_samples(index: ShardIndex) -> list[int]:
    """Numbers of the samples whose image the decoder of training refuses."""
    chunks = list(_chunks(index.width * index.height))
    bad: list[int] = []
    with open(index.tar, "rb", buffering=0) as file:

        def read(chunk: range) -> list[np.ndarray]:
            sizes, offsets = index.image_size[chunk.start : chunk.stop], index.image_offset[chunk.start :]
            places = zip(sizes.tolist(), offsets.tolist(), strict=False)
            return [np.frombuffer(os.pread(file.fileno(), *place), np.uint8) for place in places]

        while chunks:
            failed = _first_failing(map(read, chunks), len(chunks))
            if failed is None:
                break
            bad += [chunks[failed][number] for number in undecodable(read(chunks[failed]), _CPU)]
            del chunks[: failed + 1]
    return bad


def _first_failing(batches: Iterator[list[np.ndarray]], count: int) -> int | None:
    """Which of `count` batches of encoded images is the first that does not decode."""

    def source() -> DecodeInput:
        encoded = next(batches)
        size = len(encoded)
        whole = np.zeros((size, 2), np.float32), np.ones((size, 2), np.float32), np.zeros(size, np.int32)
        return DecodeInput(encoded, *whole)

    decoder = ImageDecoder(
        source, batch_size=_MOST_IMAGES, image_size=8, device=_CPU, num_threads=default_threads()
    )
    for number in range(count):
        try:
            decoder.next()
        except RuntimeError:
            return number
    return None


def _chunks(pixels: np.ndarray) -> Iterator[range]:
    start = total = 0
    for number, size in enumerate(pixels.tolist()):
        if number > start and (number - start == _MOST_IMAGES or total + size > _MOST_PIXELS):
            yield range(start, number)
            start, total = number, 0
        total += size
    if len(pixels):
        yield range(start, len(pixels))
