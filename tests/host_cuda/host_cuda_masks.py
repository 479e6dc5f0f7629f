"""The CUDA sources of upsample_masks and decode_masks on CPU tensors: as `torch.ops.groupvit_fast`."""

from __future__ import annotations

import ctypes

import torch
from host_cuda_backend import STORAGE, Launch
from torch import Tensor


class UpsampleParams(ctypes.Structure):
    _fields_ = (
        [("input", ctypes.c_void_p), ("output", ctypes.c_void_p), ("planes", ctypes.c_int64)]
        + [(name, ctypes.c_int64) for name in ("in_height", "in_width", "out_height", "out_width")]
        + [("storage", ctypes.c_int)]
    )


class DecodeParams(ctypes.Structure):
    _pointers = ("maps", "scores", "group_labels", "background_threshold", "target", "labels", "confusion")
    _numbers = (
        "batch",
        "groups",
        "classes",
        "num_classes",
        "in_height",
        "in_width",
        "out_height",
        "out_width",
    )
    _fields_ = (
        [(name, ctypes.c_void_p) for name in _pointers]
        + [(name, ctypes.c_int64) for name in _numbers]
        + [("storage", ctypes.c_int), ("score_storage", ctypes.c_int)]
    )


class _Launch(Launch):
    def updated(self, name: str, tensor: Tensor) -> int:
        """A tensor that the kernel adds to: it is read and written."""
        address = self.pointer(name, tensor, result=True)
        self._tensors[-1] = (*self._tensors[-1][:3], True, True)
        return address


def _resize(operator: str, maps: Tensor, height: int, width: int) -> Tensor:
    launch = _Launch()
    batch, groups, in_height, in_width = maps.shape
    output = maps.new_empty(batch, groups, height, width)
    small, large = (height, width), (in_height, in_width)
    sizes = (*small, *large) if operator == "upsample_backward" else (*large, *small)
    params = UpsampleParams(
        launch.pointer("input", maps),
        launch.pointer("output", output, result=True),
        batch * groups,
        *sizes,
        STORAGE[maps.dtype],
    )
    if output.numel() > 0:
        launch.run(operator, params)
    return output


def upsample_masks(maps: Tensor, height: int, width: int) -> Tensor:
    return _resize("upsample", maps, height, width)


def upsample_masks_backward(gradient: Tensor, height: int, width: int) -> Tensor:
    return _resize("upsample_backward", gradient, height, width)


def decode_masks(
    maps: Tensor,
    scores: Tensor,
    height: int,
    width: int,
    background_threshold: Tensor | None,
    target: Tensor | None,
    num_classes: int,
) -> tuple[Tensor, Tensor]:
    launch = _Launch()
    batch, groups, in_height, in_width = maps.shape
    known = scores.dim() == 2
    table = 0 if target is None else num_classes
    labels = maps.new_empty((batch, height, width), dtype=torch.int64)
    confusion = maps.new_zeros((table, table), dtype=torch.int64)
    params = DecodeParams(
        maps=launch.pointer("maps", maps),
        scores=None if known else launch.pointer("scores", scores),
        group_labels=launch.pointer("labels of groups", scores) if known else None,
        background_threshold=launch.pointer("background_threshold", background_threshold),
        target=launch.pointer("target", target),
        labels=launch.pointer("labels", labels, result=True),
        confusion=None if target is None else launch.updated("confusion", confusion),
        batch=batch,
        groups=groups,
        classes=0 if known else scores.shape[2],
        num_classes=table,
        in_height=in_height,
        in_width=in_width,
        out_height=height,
        out_width=width,
        storage=STORAGE[maps.dtype],
        score_storage=STORAGE[maps.dtype if known else scores.dtype],
    )
    if labels.numel() > 0:
        launch.run("decode", params)
    return labels, confusion
