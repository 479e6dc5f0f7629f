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
from groupvit_fast.segmentation.blending import pixel_loops, resize_labels
from groupvit_fast.segmentation.labelling import labelling
from groupvit_fast.segmentation.prompts import ClassText
from groupvit_fast.segmentation.protocols import Protocol
from groupvit_fast.segmentation.segment import Box

SCORES_PER_CELL = 1 << 20
"""Where overlapping windows could give more scores than this, only the rows that occur are kept."""


class Segmentation(NamedTuple):
    """Labels of one image and the groups behind them.

    labels: int64 [H, W], as `segment_image` returns them.
    groups: int32 [H, W], window * G + group. Where windows overlap, the one with the nearest centre counts,
        so that the groups of an image are a partition of its pixels.
    num_groups: windows * G.
    stages: for each earlier grouping stage, if asked for, such a map and the number of its groups.
    """

    labels: Tensor
    groups: Tensor
    num_groups: int
    stages: tuple[tuple[Tensor, int], ...] = ()


class Window(NamedTuple):
    """What decoding needs of one encoded window: maps [G, h', w'] at patch resolution, scores [G, K].

    stages: maps of the earlier grouping stages, where their groups are asked for.
    """

    maps: Tensor
    scores: Tensor
    stages: tuple[Tensor, ...] = ()


def decode_single_windows(
    windows: Sequence[Window], size: tuple[int, int], text: ClassText, protocol: Protocol
) -> list[Segmentation]:
    """Images of one size that are one window each: without any resize of scores a group has one label."""
    groups = winning_groups(torch.stack([window.maps for window in windows]), size)
    rule = labelling(text, protocol)
    tables = [score_rows(window, protocol) for window in windows]
    labels = [resize_labels(part, table, size, rule) for part, table in zip(groups, tables, strict=True)]
    stages = [
        tuple((winning_groups(maps[None], size)[0].int(), len(maps)) for maps in window.stages)
        for window in windows
    ]
    count = len(tables[0])
    return [Segmentation(a, b, count, c) for a, b, c in zip(labels, groups.int(), stages, strict=True)]


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
    members = window_members([window.maps for window in windows], boxes)
    tables = [score_rows(window, protocol) for window in windows]
    row_of_pixel, rows = merge_windows(members, tables, boxes)
    labels = resize_labels(row_of_pixel, rows, size, labelling(text, protocol))
    del row_of_pixel
    groups = nearest_windows(members, boxes, num_groups, size)
    stages = []
    for maps in zip(*(window.stages for window in windows), strict=True):
        count = len(maps[0])
        owners = nearest_windows(window_members(maps, boxes), boxes, count, size)
        stages.append((owners, count * len(windows)))
    return Segmentation(labels, groups, num_groups * len(windows), tuple(stages))


def window_members(maps: Sequence[Tensor], boxes: Sequence[Box]) -> list[Tensor]:
    """Maps [G, h', w'] of each window -> int16 [height, width], the group of each of its pixels."""
    sizes = [(box.bottom - box.top, box.right - box.left) for box in boxes]
    return [winning_groups(part[None], size)[0].short() for part, size in zip(maps, sizes, strict=True)]


def merge_windows(members: list[Tensor], tables: list[Tensor], boxes: Sequence[Box]) -> tuple[Tensor, Tensor]:
    """Mean scores under overlapping windows as a table.

    members: per window the group of each pixel; tables: per window the scores [G, C].
    Returns: row of each pixel of the resized image, int32 [h, w], and the rows [R, C].
    """
    height, width = max(box.bottom for box in boxes), max(box.right for box in boxes)
    row_of_pixel = members[0].new_empty((height, width), dtype=torch.int32)
    rows: list[Tensor] = []
    count = 0
    edges_y = sorted({edge for box in boxes for edge in (box.top, box.bottom)})
    edges_x = sorted({edge for box in boxes for edge in (box.left, box.right)})
    for top, bottom in pairwise(edges_y):
        for left, right in pairwise(edges_x):
            code = row_of_pixel[top:bottom, left:right]
            rows.append(merge_cell(Box(top, left, bottom, right), members, tables, boxes, code))
            code += count
            count += len(rows[-1])
    return row_of_pixel, torch.cat(rows)


def merge_cell(
    cell: Box, members: list[Tensor], tables: list[Tensor], boxes: Sequence[Box], code: Tensor
) -> Tensor:
    """`merge_windows` for a rectangle that the same windows cover: fills `code`, returns the rows."""
    covering = [
        index
        for index, box in enumerate(boxes)
        if box.top <= cell.top < box.bottom and box.left <= cell.left < box.right
    ]
    groups, channels = tables[0].shape
    rows = tables[0].new_zeros(1, channels)
    code.zero_()
    for index in covering:
        top, left = boxes[index].top, boxes[index].left
        part = members[index][cell.top - top : cell.bottom - top, cell.left - left : cell.right - left]
        code.mul_(groups).add_(part)
        used = torch.arange(len(rows) * groups, device=code.device)
        if len(used) * channels > SCORES_PER_CELL:
            used, numbers = torch.unique(code, return_inverse=True)
            code.copy_(numbers)
        rows = rows[used // groups] + tables[index][used % groups]
    return rows / len(covering)


def nearest_windows(
    members: list[Tensor], boxes: Sequence[Box], num_groups: int, size: tuple[int, int]
) -> Tensor:
    """window * G + group of each pixel of the original image, from the window with the nearest centre."""
    height, width = max(box.bottom for box in boxes), max(box.right for box in boxes)
    result = members[0].new_empty(size, dtype=torch.int32)
    window_at = {tuple(box): index for index, box in enumerate(boxes)}
    across = list(territories([(box.left, box.right) for box in boxes]))
    for top, bottom, (box_top, box_bottom) in territories([(box.top, box.bottom) for box in boxes]):
        for left, right, (box_left, box_right) in across:
            index = window_at[box_top, box_left, box_bottom, box_right]
            lines, rows = nearest_positions(height, size[0], top, bottom)
            spots, columns = nearest_positions(width, size[1], left, right)
            place_pixels(
                members[index], rows - box_top, columns - box_left, index * num_groups, result[lines, spots]
            )
    return result


def place_pixels(source: Tensor, rows: Tensor, columns: Tensor, added: int, target: Tensor) -> None:
    """target [n, m] int32 := source [h, w] int16 at rows [n] and columns [m], plus `added`."""
    if (loops := pixel_loops(source)) is not None:
        loops.pick_pixels(source.numpy(), rows.numpy(), columns.numpy(), added, target.numpy())
        return
    part = source.index_select(0, rows.to(source.device)).index_select(1, columns.to(source.device))
    target.copy_(part.int() + added)


def nearest_positions(have: int, wanted: int, start: int, end: int) -> tuple[slice, Tensor]:
    """Which of `wanted` outputs have their centre over inputs `start` to `end` of `have`; those inputs."""
    under = (torch.arange(wanted) * 2 + 1) * have // (2 * wanted)
    first, last = torch.searchsorted(under, torch.tensor([start, end])).tolist()
    return slice(first, last), under[first:last]


def territories(spans: list[tuple[int, int]]) -> list[tuple[int, int, tuple[int, int]]]:
    """Cut a line where the nearest span centre changes: (start, end, span) in order."""
    spans = sorted(set(spans))
    cuts = [0] + [(a + b + c + d + 2) // 4 for (a, b), (c, d) in pairwise(spans)] + [spans[-1][1]]
    return [(start, end, span) for (start, end), span in zip(pairwise(cuts), spans, strict=True)]
