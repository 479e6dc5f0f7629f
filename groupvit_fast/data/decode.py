"""The one DALI pipeline, for CPU and GPU: encoded bytes and crop windows in, normalised pixels out.

DALI decodes only the crop window, resizes, augments, flips and normalises. What to decode, where to crop and
how to augment comes from outside, sample by sample, because DALI's own webdataset reader cannot shuffle
across tars, names no sample when one breaks, and dies when a mapped tar is rewritten.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from groupvit_fast.data.augment import Layers, erase
from groupvit_fast.data.augment_dali import augmented
from groupvit_fast.data.images import IMAGENET_MEAN, IMAGENET_STD
from groupvit_fast.data.native import native_module
from groupvit_fast.data.parsing import PARSING

_MEAN, _STD = (255 * np.array(values, np.float32) for values in (IMAGENET_MEAN, IMAGENET_STD))
_MOST_BUFFERS = 8  # more than are on their way to the training step


class DecodeInput(NamedTuple):
    """One batch for the decoder."""

    encoded: list[np.ndarray]  # B uint8 arrays, the image files
    anchor: np.ndarray  # float32 [B, 2]: left and top of the window as fractions of width and height
    extent: np.ndarray  # float32 [B, 2]: its width and height as fractions
    mirror: np.ndarray  # int32 [B]: 1 flips left and right
    layers: Layers | None = None  # augmentation of the resized crops
    erased: np.ndarray | None = None  # int64 [B, 5]: rectangles to fill with noise, see Augmentation.draw


def window_fractions(
    windows: np.ndarray, width: np.ndarray, height: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pixel windows [B, 4] (x, y, width, height) to float32 (anchor, extent).

    Fractions, so that a decoder that disagrees with the index about a picture's size still stays inside it.
    """
    size = np.stack([width, height], axis=1)
    return (windows[:, :2] / size).astype(np.float32), (windows[:, 2:] / size).astype(np.float32)


@pipeline_def
def _image_pipeline(source, image_size: int, layers: int, device: str, crops_only: bool):
    count = 3 if crops_only else 7 if layers else 4
    encoded, anchor, extent, *rest = fn.external_source(source=source, num_outputs=count, batch=True)
    pixels = fn.decoders.image_slice(
        encoded, anchor, extent, axis_names="WH", device=device, output_type=types.RGB
    )
    if crops_only:
        return pixels
    pixels = fn.resize(
        pixels, resize_x=image_size, resize_y=image_size, interp_type=types.INTERP_LINEAR, antialias=True
    )
    mirror, *plan = rest
    if layers:
        pixels = augmented(pixels, *plan, layers=layers, size=image_size, gpu=device == "mixed")
    # Mirrored last, where it costs nothing: the layers' directions are random, so the distribution stays.
    return normalized(pixels, mirror)


def normalized(pixels, mirror=0):
    """uint8 HWC to float32 CHW with ImageNet mean and standard deviation, mirrored where `mirror` is 1."""
    return fn.crop_mirror_normalize(
        pixels,
        mirror=mirror,
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=_MEAN.tolist(),
        std=_STD.tolist(),
    )


def to_torch(pixels, device: torch.device) -> torch.Tensor:
    """A pipeline's output as a tensor that nobody else writes to."""
    pixels = torch.from_dlpack(pixels.as_tensor())
    if device.type == "cuda":
        # A copy owned by torch's allocator, complete before DALI's buffer goes back: DALI would reuse it
        # without asking the training stream.
        pixels = pixels.clone()
        torch.cuda.current_stream(device).synchronize()
    return pixels


class ImageDecoder:
    """Runs the pipeline on the batches that `source` returns; one batch is decoded ahead.

    Every input must have `layers` layers. On a CPU DALI decodes the crop windows and compiled code does the
    rest, several times faster than DALI's operators there; without it (`native` False) DALI does it all.
    """

    def __init__(
        self,
        source: Callable[[], DecodeInput],
        *,
        batch_size: int,
        image_size: int,
        device: torch.device,
        layers: int = 0,
        num_threads: int = 1,
        prefetch: int = 2,
        native: bool | None = None,
    ):
        on_gpu = device.type == "cuda"
        self.device, self.image_size, self.num_threads = device, image_size, num_threads
        self._finish = None if on_gpu or native is False else _compiled_finish()
        self._source, self._layers = source, layers
        self._ahead: deque[DecodeInput] = deque()
        self._buffers = _Buffers()
        layers_in_dali = 0 if self._finish else layers
        with PARSING:  # conditions are parsed, so only augmentation has them
            self._pipeline = _image_pipeline(
                self._next_input,
                image_size,
                layers_in_dali,
                "mixed" if on_gpu else "cpu",
                self._finish is not None,
                enable_conditionals=layers_in_dali > 0,
                batch_size=batch_size,
                num_threads=num_threads,
                device_id=device.index if on_gpu else None,
                prefetch_queue_depth=prefetch,
            )
        self._pipeline.build()

    def _next_input(self) -> tuple:
        """What the pipeline reads; the rest of the input waits here for its pixels."""
        item = self._source()
        self._ahead.append(item)
        crops = item.encoded, item.anchor, item.extent
        if self._finish:
            return crops
        return *crops, item.mirror, *(item.layers if self._layers else ())

    def next(self) -> torch.Tensor:
        """The next batch, float32 [B, 3, H, W], normalised with ImageNet mean and standard deviation.

        Raises RuntimeError when any image of the batch cannot be decoded; it is unusable after that.
        """
        (pixels,) = self._pipeline.run()
        item = self._ahead.popleft()
        images = self._finished(pixels, item) if self._finish else to_torch(pixels, self.device)
        if item.erased is not None:
            erase(images, item.erased)
        return images

    def _finished(self, crops, item: DecodeInput) -> torch.Tensor:
        """Resize, augment, mirror and normalise decoded crops of any size."""
        out = self._buffers.take((len(crops), 3, self.image_size, self.image_size))
        pictures = [np.asarray(crops[number]) for number in range(len(crops))]
        layers = item.layers or Layers.none(len(crops))
        self._finish(pictures, item.mirror, *layers, _MEAN, _STD, out, self.num_threads)
        return torch.from_numpy(out)


class _Buffers:
    """Arrays for batches, used again once nobody holds them: fresh memory costs more than filling it.

    A tensor made by `torch.from_numpy`, and every view of it, holds a reference to the array.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """A float32 array of arbitrary content that nobody else has."""
        for number in range(len(self._arrays)):
            # two references: the list's and the one that is handed to getrefcount
            if sys.getrefcount(self._arrays[number]) == 2 and self._arrays[number].shape == shape:
                return self._arrays[number]
        array = np.empty(shape, np.float32)
        if len(self._arrays) < _MOST_BUFFERS:
            self._arrays.append(array)
        return array


def _compiled_finish() -> Callable[..., None] | None:
    """The compiled code for CPUs, where the package was built with it."""
    module = native_module("finish_pictures")
    return module and module.finish_pictures


def undecodable(encoded: Sequence[np.ndarray], device: torch.device) -> list[int]:
    """Numbers of the images that DALI cannot decode on `device`, found by decoding each one alone."""
    bad: list[int] = []
    while (first := bad[-1] + 1 if bad else 0) < len(encoded):
        bad_now = _first_undecodable(encoded[first:], device)
        if bad_now is None:
            break
        bad.append(first + bad_now)
    return bad


def _first_undecodable(encoded: Sequence[np.ndarray], device: torch.device) -> int | None:
    whole = np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32), np.zeros(1, np.int32)
    images = iter(encoded)
    decoder = ImageDecoder(
        lambda: DecodeInput([next(images)], *whole), batch_size=1, image_size=8, device=device
    )
    for number in range(len(encoded)):
        try:
            decoder.next()
        except RuntimeError:
            return number
    return None


def numbered_device(device: str | torch.device) -> torch.device:
    """Give "cuda" its number now: the current device belongs to the thread, and a loader has its own."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def side_stream(device: torch.device) -> contextlib.AbstractContextManager:
    """A stream of the loader's own, so that its copies do not queue behind the training step."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else contextlib.nullcontext()


def default_threads() -> int:
    """The cores this process may use, shared with the other ranks of the machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
