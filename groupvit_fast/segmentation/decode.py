"""Decoding without score maps of every class: from encoded windows to the labels of the original image.

A pixel's scores depend only on which group it has in each window that covers it, so an image has few distinct
score rows (8 for one window, 8 x 8 where two overlap). They are computed once each; a pixel of the original
image whose four bilinear neighbours have one label takes it, and only the pixels on region borders blend
rows. Equal to the reference up to the rounding of that blend; the tests hold 99.99 % of pixels.

Where an image is one window of its own size there is nothing to blend: one call of `ops.decode_masks` gives
the groups of a whole batch, and each group has one label.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from groupvit_fast import ops
from groupvit_fast.segmentation.labelling import BestChannel, LateSoftmax, labelling
from groupvit_fast.segmentation.prompts import ClassText
from groupvit_fast.segmentation.protocols import Protocol
from groupvit_fast.segmentation.segment import Box

Rule = BestChannel | LateSoftmax
SCORES_PER_CELL = 1 << 20
"""Where overlapping windows could give more scores than this, only the rows that occur are kept."""
PIXELS_PER_BLEND = 1 << 16
PIXELS_PER_BAND = 1 << 20


class Segmentation(NamedTuple):
    """Labels of one image and the groups behind them.

    labels: int64 [H, W], as `segment_image` returns them.
    groups: int64 [H, W], window * G + group. Where windows overlap, the one with the nearest centre counts,
        so that the groups of an image are a partition of its pixels.
    num_groups: windows * G.
    """

    labels: Tensor
    groups: Tensor
    num_groups: int


class Taps(NamedTuple):
    """Bilinear interpolation along one axis: two source positions and the weight of the second, each [n]."""

    first: Tensor
    second: Tensor
    weight: Tensor


class Window(NamedTuple):
    """What decoding needs of one encoded window: maps [G, h', w'] at patch resolution, scores [G, K]."""

    maps: Tensor
    scores: Tensor


class Small(NamedTuple):
    """A score map before resizing: each pixel's kind, int32 [h, w], and its row of `rows` [R, C]."""

    kinds: Tensor
    label_of_kind: Tensor | None
    row_of_pixel: Tensor
    rows: Tensor
    rule: Rule


def decode_single_windows(
    windows: Sequence[Window], size: tuple[int, int], text: ClassText, protocol: Protocol
) -> list[Segmentation]:
    """Images of one size that are one window each: without any resize of scores a group has one label."""
    groups = winning_groups(torch.stack([window.maps for window in windows]), size)
    rule = labelling(text, protocol)
    label_of_group = torch.stack([rule.labels(score_rows(window, protocol)) for window in windows])
    labels = label_of_group.gather(1, groups.flatten(1)).view_as(groups)
    return [Segmentation(*pair, label_of_group.shape[1]) for pair in zip(labels, groups, strict=True)]


def winning_groups(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """maps [B, G, h, w] -> int64 [B, *size], the strongest group of each pixel."""
    batch, groups = maps.shape[:2]
    names = torch.arange(groups, device=maps.device).expand(batch, groups)
    return ops.decode_masks(maps, names, size)


def score_rows(window: Window, protocol: Protocol) -> Tensor:
    """The score channels of each group, [G, C]; the first is background where the protocol adds that."""
    scores, threshold = window.scores, protocol.background_threshold
    if not protocol.has_background_channel:
        return scores
    if protocol.background_rule == "constant":
        background = torch.full_like(scores[:, :1], threshold)
    else:
        background = (scores.amax(dim=1, keepdim=True) < scores.max().clamp(max=threshold)).to(scores)
    return torch.cat([background, scores], dim=1)


def decode_windows(
    windows: Sequence[Window],
    boxes: Sequence[Box],
    size: tuple[int, int],
    text: ClassText,
    protocol: Protocol,
) -> Segmentation:
    """One image from its windows: average the scores where windows overlap, resize to `size`, label."""
    num_groups = len(windows[0].scores)
    members = [
        winning_groups(window.maps[None], (box.bottom - box.top, box.right - box.left))[0]
        for window, box in zip(windows, boxes, strict=True)
    ]
    tables = [score_rows(window, protocol) for window in windows]
    row_of_pixel, rows = merge_windows(members, tables, boxes)
    owners = nearest_windows(members, boxes, num_groups)
    return Segmentation(
        resize_labels(row_of_pixel, rows, size, labelling(text, protocol)),
        resize_nearest(owners, size),
        num_groups * len(windows),
    )


def merge_windows(members: list[Tensor], tables: list[Tensor], boxes: Sequence[Box]) -> tuple[Tensor, Tensor]:
    """Mean scores under overlapping windows as a table.

    members: per window the group of each pixel; tables: per window the scores [G, C].
    Returns: row of each pixel of the resized image, int64 [h, w], and the rows [R, C].
    """
    height, width = max(box.bottom for box in boxes), max(box.right for box in boxes)
    row_of_pixel = members[0].new_empty(height, width)
    rows: list[Tensor] = []
    count = 0
    edges_y = sorted({edge for box in boxes for edge in (box.top, box.bottom)})
    edges_x = sorted({edge for box in boxes for edge in (box.left, box.right)})
    for top, bottom in pairwise(edges_y):
        for left, right in pairwise(edges_x):
            cell, cell_rows = merge_cell(Box(top, left, bottom, right), members, tables, boxes)
            row_of_pixel[top:bottom, left:right] = cell + count
            rows.append(cell_rows)
            count += len(cell_rows)
    return row_of_pixel, torch.cat(rows)


def merge_cell(
    cell: Box, members: list[Tensor], tables: list[Tensor], boxes: Sequence[Box]
) -> tuple[Tensor, Tensor]:
    """`merge_windows` for a rectangle that the same windows cover everywhere."""
    covering = [
        index
        for index, box in enumerate(boxes)
        if box.top <= cell.top < box.bottom and box.left <= cell.left < box.right
    ]
    groups, channels = tables[0].shape
    code = torch.zeros((), dtype=torch.int64, device=members[0].device)
    rows = tables[0].new_zeros(1, channels)
    for index in covering:
        top, left = boxes[index].top, boxes[index].left
        part = members[index][cell.top - top : cell.bottom - top, cell.left - left : cell.right - left]
        code = code * groups + part
        used = torch.arange(len(rows) * groups, device=code.device)
        if len(used) * channels > SCORES_PER_CELL:
            used, code = torch.unique(code, return_inverse=True)
        rows = rows[used // groups] + tables[index][used % groups]
    return code, rows / len(covering)


def nearest_windows(members: list[Tensor], boxes: Sequence[Box], num_groups: int) -> Tensor:
    """window * G + group of each pixel of the resized image, from the window with the nearest centre."""
    height, width = max(box.bottom for box in boxes), max(box.right for box in boxes)
    result = members[0].new_empty(height, width)
    for top, bottom, first in territories([(box.top, box.bottom) for box in boxes]):
        for left, right, second in territories([(box.left, box.right) for box in boxes]):
            index = next(
                i
                for i, box in enumerate(boxes)
                if (box.top, box.bottom, box.left, box.right) == first + second
            )
            box = boxes[index]
            part = members[index][top - box.top : bottom - box.top, left - box.left : right - box.left]
            result[top:bottom, left:right] = part + index * num_groups
    return result


def territories(spans: list[tuple[int, int]]) -> list[tuple[int, int, tuple[int, int]]]:
    """Cut a line where the nearest span centre changes: (start, end, span) in order."""
    spans = sorted(set(spans))
    cuts = [0] + [(a + b + c + d + 2) // 4 for (a, b), (c, d) in pairwise(spans)] + [spans[-1][1]]
    return [(start, end, span) for (start, end), span in zip(pairwise(cuts), spans, strict=True)]


def resize_nearest(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Integer [h, w] -> [*size], each pixel the one under its centre."""
    if tuple(labels.shape) == tuple(size):
        return labels
    rows, columns = (
        (torch.arange(wanted, device=labels.device) * 2 + 1) * have // (2 * wanted)
        for wanted, have in zip(size, labels.shape, strict=True)
    )
    return labels[rows][:, columns]


def resize_labels(row_of_pixel: Tensor, rows: Tensor, size: tuple[int, int], rule: Rule) -> Tensor:
    """Labels of the bilinearly resized score map that `row_of_pixel` [h, w] and `rows` [R, C] stand for."""
    if tuple(row_of_pixel.shape) == tuple(size):
        return rule.labels(rows)[row_of_pixel]
    kind_of_row, label_of_kind = rule.kinds(rows)
    kinds = kind_of_row.int()[row_of_pixel]
    rule, rows = rule.select(rows)
    vertical = bilinear_taps(kinds.shape[0], size[0], rows)
    horizontal = bilinear_taps(kinds.shape[1], size[1], rows)
    lines = max(1, PIXELS_PER_BAND // size[1])
    bands = zip(*(part.split(lines) for part in vertical), strict=True)
    small = Small(kinds, label_of_kind, row_of_pixel, rows, rule)
    return torch.cat([blend_band(small, Taps(*band), horizontal) for band in bands])


def blend_band(small: Small, vertical: Taps, horizontal: Taps) -> Tensor:
    """`resize_labels` for some output lines, int64: only pixels between different kinds blend their rows."""
    lines = [small.kinds[y] for y in (vertical.first, vertical.second)]
    a, b, c, d = (line[:, x] for line in lines for x in (horizontal.first, horizontal.second))
    result = a.long() if small.label_of_kind is None else small.label_of_kind[a]
    mixed = (a != b) | (a != c) | (a != d)
    for y, x in zip(*(part.split(PIXELS_PER_BLEND) for part in mixed.nonzero(as_tuple=True)), strict=True):
        i, j = (vertical.first[y], vertical.second[y]), (horizontal.first[x], horizontal.second[x])
        a, b, c, d = (small.rows[small.row_of_pixel[row, column]] for row in i for column in j)
        wy, wx = vertical.weight[y, None], horizontal.weight[x, None]
        upper, lower = a * (1 - wx) + b * wx, c * (1 - wx) + d * wx
        result[y, x] = small.rule.labels(upper * (1 - wy) + lower * wy)
    return result


def bilinear_taps(source: int, wanted: int, like: Tensor) -> Taps:
    """Where each of `wanted` outputs reads `source` inputs: the rule of align_corners=False."""
    position = (torch.arange(wanted, device=like.device, dtype=like.dtype) + 0.5) * (source / wanted) - 0.5
    position = position.clamp(min=0)
    first = position.long().clamp(max=source - 1)
    return Taps(first, (first + 1).clamp(max=source - 1), position - first)
