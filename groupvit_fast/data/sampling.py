"""Which sample comes when, and every random number used on it, as pure functions of (seed, position).

A position counts samples over all ranks and epochs: epoch e holds positions e*N .. e*N + N-1. Nothing here
keeps state, so a run that resumes at a position continues exactly, also with another batch size.
Only the raw 64-bit output of Philox is used, which NumPy keeps stable across versions.
"""

from __future__ import annotations

import math

import numpy as np

DRAWS = 64  # random words owned by one position: 4 for each of 10 crop attempts, flip, text, rest unused
CROP_ATTEMPTS = 10
FLIP_DRAW = 4 * CROP_ATTEMPTS
TEXT_DRAW = FLIP_DRAW + 1
_ORDER_STREAM = 1
_SAMPLE_STREAM = 2
_AUGMENT_STREAM = 3
_SOURCE_SEED, _WINDOW_SEED = 1 << 48, 1 << 60  # far from the seeds that people use


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(num_samples), int64, that depends on (seed, epoch) alone."""
    generator = np.random.Philox(key=[_key(seed), _ORDER_STREAM], counter=[0, 0, epoch, 0])
    return np.argsort(generator.random_raw(num_samples), kind="stable")


def weighted_order(sizes: list[int], weights: list[float], seed: int, epoch: int) -> np.ndarray:
    """The samples of one epoch over several sources, each seen `weight` times on average, shuffled.

    Source s has the numbers sum(sizes[:s]) and on, and gives round(weight * size) of them to each epoch: the
    next ones of an endless row of its own permutations, so no sample is ever two visits ahead of another.
    """
    parts, start = [], 0
    for source, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        share = epoch_share(size, weight)
        turns = np.arange(epoch * share, (epoch + 1) * share)
        row = np.empty(share, np.int64)
        for turn in range(int(turns[0] // size), int(turns[-1] // size) + 1) if share else ():
            mine = turns // size == turn
            row[mine] = epoch_order(size, seed + _SOURCE_SEED * (source + 1), turn)[turns[mine] % size]
        parts.append(start + row)
        start += size
    pool = np.concatenate(parts)
    return pool[epoch_order(len(pool), seed, epoch)]


def epoch_share(size: int, weight: float) -> int:
    """How many samples a source of `size` gives to an epoch."""
    return round(weight * size)


def window_order(
    order: np.ndarray, shards: np.ndarray, shard_bytes: np.ndarray, most: int, seed: int, epoch: int
) -> np.ndarray:
    """`order` rearranged so that it needs few shards at a time: windows of at most `most` bytes of shards.

    `shards` [len(order)] is the shard of each sample of `order`. Which shards share a window is drawn anew in
    each epoch; inside a window the order stays that of `order`.
    """
    turn = epoch_order(len(shard_bytes), seed + _WINDOW_SEED, epoch)
    window, filled, number = np.zeros(len(shard_bytes), np.int64), 0, 0
    for shard in turn:
        if filled and filled + shard_bytes[shard] > most:
            number, filled = number + 1, 0
        window[shard] = number
        filled += shard_bytes[shard]
    return order[np.argsort(window[shards], kind="stable")]


def draws(seed: int, first: int, count: int) -> np.ndarray:
    """Random uint64 words [count, DRAWS] of the positions first .. first+count-1."""
    return _words(seed, _SAMPLE_STREAM, first, count)


def augment_draws(seed: int, first: int, count: int) -> np.ndarray:
    """As many other random words of the same positions: those of the augmentation."""
    return _words(seed, _AUGMENT_STREAM, first, count)


def _words(seed: int, stream: int, first: int, count: int) -> np.ndarray:
    counter = first * (DRAWS // 4)  # one Philox block gives 4 words
    generator = np.random.Philox(key=[_key(seed), stream], counter=[counter, 0, 0, 0])
    return generator.random_raw(count * DRAWS).reshape(count, DRAWS)


def uniform(words: np.ndarray) -> np.ndarray:
    """Turn uint64 words into float64 in [0, 1)."""
    return (words >> np.uint64(11)) * 2.0**-53


def crop_windows(
    widths: np.ndarray,
    heights: np.ndarray,
    words: np.ndarray,
    min_area: float,
    max_area: float = 1.0,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """Random resized crop windows, as torchvision and timm draw them.

    `widths`, `heights` [B] in pixels, `words` [B, DRAWS]; returns [B, 4] int64: x, y, width, height. Ten
    tries of an area fraction in [min_area, max_area] and a log-uniform aspect ratio; if none fits inside the
    image, the largest centred window with an allowed aspect ratio.
    """
    draw = uniform(words[:, : 4 * CROP_ATTEMPTS]).reshape(-1, CROP_ATTEMPTS, 4)
    area = (widths * heights)[:, None] * (min_area + (max_area - min_area) * draw[..., 0])
    aspect = np.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * draw[..., 1])
    width = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    height = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (width > 0) & (width <= widths[:, None]) & (height > 0) & (height <= heights[:, None])
    rows, first = np.arange(len(widths)), fits.argmax(axis=1)
    width, height = width[rows, first], height[rows, first]
    x = np.floor(draw[rows, first, 2] * (widths - width + 1)).astype(np.int64)
    y = np.floor(draw[rows, first, 3] * (heights - height + 1)).astype(np.int64)
    windows = np.stack([x, y, width, height], axis=1)
    return np.where(fits.any(axis=1)[:, None], windows, _centred(widths, heights, ratio))


def _centred(widths: np.ndarray, heights: np.ndarray, ratio: tuple[float, float]) -> np.ndarray:
    width = np.minimum(widths, np.maximum(1, np.rint(heights * ratio[1]))).astype(np.int64)
    height = np.minimum(heights, np.maximum(1, np.rint(widths / ratio[0]))).astype(np.int64)
    return np.stack([(widths - width) // 2, (heights - height) // 2, width, height], axis=1)


def _key(seed: int) -> int:
    return seed % 2**64
