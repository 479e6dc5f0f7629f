"""Labels of a score map that is resized bilinearly, without a resized score map.

A pixel of the result whose four neighbours in the map are of one kind takes its label (labelling.py says
why); only the pixels on region borders blend rows of scores. On a CPU the first part is one compiled pass
over the pixels (csrc/pixel_labels.cpp); elsewhere, and without a compiler, tensor operations do the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from groupvit_fast import ops
from groupvit_fast.data.native import native_module
from groupvit_fast.segmentation.labelling import BestChannel, LateSoftmax

Rule = BestChannel | LateSoftmax
SCORES_PER_BLEND = 1 << 17
PIXELS_PER_BAND = 1 << 20


class Taps(NamedTuple):
    """Bilinear interpolation along one axis: two source positions and the weight of the second, each [n]."""

    first: Tensor
    second: Tensor
    weight: Tensor


class ScoreMap(NamedTuple):
    """A score map before resizing: each pixel's row of `rows` [R, C], and how a row becomes a label."""

    row_of_pixel: Tensor
    rows: Tensor
    rule: Rule


def resize_labels(row_of_pixel: Tensor, rows: Tensor, size: tuple[int, int], rule: Rule) -> Tensor:
    """Labels of the resized score map that `row_of_pixel`, int32 [h, w], and `rows` [R, C] stand for.

    Returns: int64 [*size].
    """
    if rule.area_threshold is not None:
        first = resize_labels(row_of_pixel, rows, size, rule.before_thresholds())
        rule = rule.without_small(first)
    height, width = row_of_pixel.shape
    if (height, width) == tuple(size):
        return rule.labels(rows)[row_of_pixel]
    kinds, label_of_kind = rule.kinds(rows)
    rule, rows = rule.select(rows)
    small = ScoreMap(row_of_pixel.contiguous(), rows, rule)
    vertical, horizontal = bilinear_taps(height, size[0], rows), bilinear_taps(width, size[1], rows)
    result = torch.empty(size, dtype=torch.int64, device=rows.device)
    if (loops := pixel_loops(rows)) is not None:
        names = None if label_of_kind is None else label_of_kind.numpy()
        lines, spots = (taps.first.int().numpy() for taps in (vertical, horizontal))
        args = small.row_of_pixel.numpy(), kinds.int().numpy(), names, lines, spots, result.numpy()
        mixed = torch.from_numpy(loops.label_uniform_pixels(*args))
        blend_pixels(small, vertical, horizontal, (mixed // size[1], mixed % size[1]), result)
        return result
    kinds = kinds.to(torch.int16 if kinds.max() < 1 << 15 else torch.int32)
    cells = uniform_cells(kinds.index_select(0, row_of_pixel.flatten()).view_as(row_of_pixel))
    for band, labels in bands(vertical, result):
        found = cells.index_select(0, band.first).index_select(1, horizontal.first)
        labels.copy_(found if label_of_kind is None else label_of_kind[found.clamp(min=0).int()])
        blend_pixels(small, band, horizontal, (found < 0).nonzero(as_tuple=True), labels)
    return result


def pixel_loops(like: Tensor) -> ModuleType | None:
    """The compiled loops over pixels, if they can work on tensors such as this one."""
    wanted = like.device.type == "cpu" and ops.backend() != "reference"
    return native_module("label_uniform_pixels") if wanted else None


def bands(vertical: Taps, result: Tensor) -> Iterator[tuple[Taps, Tensor]]:
    """A large result in parts of some lines, which bounds the memory of what is made on the way."""
    lines = max(1, PIXELS_PER_BAND // result.shape[1])
    for first, second, weight, labels in zip(
        *(part.split(lines) for part in (*vertical, result)), strict=True
    ):
        yield Taps(first, second, weight), labels


def uniform_cells(kinds: Tensor) -> Tensor:
    """[h, w] -> the kind of each pixel if its right, lower and lower right neighbours have it, else -1."""
    cells = kinds.clone()
    cells[:, :-1].masked_fill_(kinds[:, :-1] != kinds[:, 1:], -1)
    lower = cells.clone()  # a line in which neighbours agree with the line above, and among themselves
    lower[:-1].masked_fill_(cells[1:] != kinds[:-1], -1)
    return torch.minimum(cells, lower)


def blend_pixels(
    small: ScoreMap, vertical: Taps, horizontal: Taps, mixed: tuple[Tensor, Tensor], result: Tensor
) -> None:
    """Set the labels of the pixels (y, x) in `mixed`, which lie between different kinds."""
    row_of_pixel, width = small.row_of_pixel.flatten(), small.row_of_pixel.shape[1]
    count = max(1, SCORES_PER_BLEND // small.rows.shape[1])
    for y, x in zip(*(part.split(count) for part in mixed), strict=True):
        i, j = (vertical.first[y], vertical.second[y]), (horizontal.first[x], horizontal.second[x])
        corners = (row_of_pixel.index_select(0, line * width + spot) for line in i for spot in j)
        a, b, c, d = (small.rows.index_select(0, corner) for corner in corners)
        wy, wx = vertical.weight[y, None], horizontal.weight[x, None]
        upper, lower = a.lerp_(b, wx), c.lerp_(d, wx)
        result[y, x] = small.rule.labels(upper.lerp_(lower, wy))


def bilinear_taps(source: int, wanted: int, like: Tensor) -> Taps:
    """Where each of `wanted` outputs reads `source` inputs: the rule of align_corners=False."""
    position = (torch.arange(wanted, device=like.device, dtype=like.dtype) + 0.5) * (source / wanted) - 0.5
    position = position.clamp(min=0)
    first = position.long().clamp(max=source - 1)
    return Taps(first, (first + 1).clamp(max=source - 1), position - first)
