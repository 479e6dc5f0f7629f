"""Tensors whose samples lie so far apart that a 32-bit index would wrap, in memory that is never touched."""

from __future__ import annotations

import mmap

import torch

MAP_NORESERVE = 0x4000
STEP = 2**32  # elements from one sample to the next


def far_apart(tensor):
    """The same values; untouched memory costs nothing."""
    size = tensor.element_size()
    room = mmap.mmap(
        -1, (STEP * (len(tensor) - 1) + tensor[0].numel()) * size, mmap.MAP_PRIVATE | MAP_NORESERVE
    )
    memory = torch.frombuffer(room, dtype=tensor.dtype)
    moved = memory.as_strided(tensor.shape, (STEP, *tensor.stride()[1:]))
    return moved.copy_(tensor)
