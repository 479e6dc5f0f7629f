"""One photo in depth: encode it once, label it with any class lists, look at the groups of each stage.

The labels are those of `batch.segment_batch`. What does not depend on the class names is kept, so that a new
class list costs milliseconds: the windows' encodings, and the group that each pixel of a window belongs to.

Shapes: G final groups, K classes, C score channels (K, or 1 + K with background), h x w the resized image or
a window of it, H x W the wanted size, h' x w' the patch grid of a window.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from groupvit_fast import ops
from groupvit_fast.console import UserError
from groupvit_fast.model import GroupEncoding
from groupvit_fast.segmentation.batch import check_size, windows_per_forward
from groupvit_fast.segmentation.blending import Rule, bilinear_taps, resize_labels
from groupvit_fast.segmentation.decode import (
    Window,
    merge_windows,
    nearest_windows,
    score_rows,
    winning_groups,
)
from groupvit_fast.segmentation.labelling import labelling
from groupvit_fast.segmentation.prompts import ClassText, class_embeddings, synonyms
from groupvit_fast.segmentation.protocols import Protocol
from groupvit_fast.segmentation.segment import (
    Box,
    best_name_of_class,
    group_class_scores,
    learnt_scale,
    low_resolution_maps,
    prepare,
    window_boxes,
)


class EncodedPhoto(NamedTuple):
    """A photo as the model sees it, whatever the class names.

    size: (H, W) of the photo; boxes: its windows, in pixels of the resized photo; encodings: one a window,
    of batch size 1; members: per window the final group of each pixel, int16 [h, w].
    """

    size: tuple[int, int]
    boxes: list[Box]
    encodings: list[GroupEncoding]
    members: list[Tensor]

    @property
    def stages(self) -> int:
        return len(self.encodings[0].maps)


class Scores(NamedTuple):
    """What a class list gives for a photo.

    row_of_pixel: int32 [h, w], for each pixel of the resized photo its row of `rows`, float [R, C].
    rule: how a row becomes a label; by_label: [R, labels], 0..1, the rows as scores of labels.
    groups: [windows, G, K], 0..1, scores of the classes for each final group; background is none of them.
    """

    row_of_pixel: Tensor
    rows: Tensor
    rule: Rule
    by_label: Tensor
    groups: Tensor


@torch.no_grad()
def encode_photo(model: torch.nn.Module, image: Tensor, protocol: Protocol) -> EncodedPhoto:
    """Encode every window of `image` (uint8 [H, W, 3]) once, on the model's device.

    `protocol` must have been resolved; the model must be in eval mode. Errors: UserError for a photo thinner
    than one patch and for weights that give NaN.
    """
    check_size(*image.shape[:2], protocol, model.config.image.patch_size)
    pixels = prepare(image.to(next(model.parameters()).device), protocol)
    boxes = window_boxes(*pixels.shape[-2:], protocol)
    height, width = boxes[0].bottom - boxes[0].top, boxes[0].right - boxes[0].left  # all have one size
    crops = [pixels[(slice(None), *box.slices())] for box in boxes]
    count = windows_per_forward(height, width, pixels.device)
    encodings = []
    for start in range(0, len(crops), count):
        encoding = model.encode_groups(torch.stack(crops[start : start + count]))
        if not encoding.groups.isfinite().all():
            raise UserError(
                "the model gives NaN: these weights are damaged or diverged; use another checkpoint"
            )
        encodings += [_one(encoding, index) for index in range(len(encoding.groups))]
    maps = (low_resolution_maps(item).float() for item in encodings)
    members = [winning_groups(part, (height, width))[0].short() for part in maps]
    return EncodedPhoto(tuple(image.shape[:2]), boxes, encodings, members)


def _one(encoding: GroupEncoding, index: int) -> GroupEncoding:
    part = slice(index, index + 1)
    maps = tuple(stage[part] for stage in encoding.maps)
    return GroupEncoding(encoding.groups[part], encoding.image[part], maps, encoding.grid)


@torch.no_grad()
def score_photo(model: torch.nn.Module, photo: EncodedPhoto, text: ClassText, protocol: Protocol) -> Scores:
    """Score every class for every group of the photo and average where windows overlap."""
    scale = learnt_scale(model)
    tables = [group_class_scores(encoding, text, protocol, scale)[0] for encoding in photo.encodings]
    channels = [score_rows(Window(photo.members[0], table), protocol) for table in tables]
    row_of_pixel, rows = merge_windows(photo.members, channels, photo.boxes)
    groups, by_label = torch.stack(tables), rows
    if protocol.class_scores == "late":  # rows are scale x cosine of every name, those of background included
        own_names = protocol.background_threshold is not None
        groups, by_label = (best_name_of_class(part.softmax(dim=-1), text) for part in (groups, rows))
        groups = groups[..., int(own_names) :]
    return Scores(row_of_pixel, rows, labelling(text, protocol), by_label, groups)


def label_photo(scores: Scores, size: tuple[int, int]) -> Tensor:
    """int64 [*size]: the class of each pixel; with a background rule 0 is background and class k is k + 1."""
    return resize_labels(scores.row_of_pixel, scores.rows, size, scores.rule)


def score_of_labels(scores: Scores, labels: Tensor) -> Tensor:
    """float [H, W]: the score that each pixel's own label has there, resized bilinearly."""
    down = bilinear_taps(scores.row_of_pixel.shape[0], labels.shape[0], scores.rows)
    across = bilinear_taps(scores.row_of_pixel.shape[1], labels.shape[1], scores.rows)
    upper, lower = (
        torch.lerp(
            *(scores.by_label[scores.row_of_pixel[y][:, x], labels] for x in (across.first, across.second)),
            across.weight,
        )
        for y in (down.first, down.second)
    )
    return torch.lerp(upper, lower, down.weight[:, None])


def stage_groups(photo: EncodedPhoto, stage: int, size: tuple[int, int]) -> Tensor:
    """int32 [*size]: the group of grouping stage `stage` that each pixel belongs to, window * S + group.

    S is the number of groups of that stage. Where windows overlap, the one with the nearest centre counts.
    """
    if stage == photo.stages - 1:
        members, count = photo.members, photo.encodings[0].groups.shape[1]
    else:
        window = tuple(photo.members[0].shape)
        soft = [ops.compose_assignments(item.maps[: stage + 1]) for item in photo.encodings]
        maps = [part.unflatten(-1, photo.encodings[0].grid).float() for part in soft]
        members, count = [winning_groups(part, window)[0].short() for part in maps], maps[0].shape[1]
    return nearest_windows(members, photo.boxes, count, size)


def soft_maps(photo: EncodedPhoto) -> Tensor:
    """float [windows, G, h', w']: how far each patch belongs to each final group, 0 to 1."""
    return torch.cat([low_resolution_maps(encoding).float() for encoding in photo.encodings])


class TextBank:
    """Text embeddings by name, for one model and protocol: a name is embedded when it is first asked for."""

    def __init__(self, model: torch.nn.Module, protocol: Protocol, capacity: int = 50_000) -> None:
        self.model, self.protocol, self.capacity = model, protocol, capacity
        self._rows: OrderedDict[str, Tensor] = OrderedDict()

    def encode(self, entries: Sequence[str]) -> ClassText:
        """Like `prompts.encode_classes`; beyond `capacity` the names used longest ago are forgotten."""
        names = [(name, index) for index, entry in enumerate(entries) for name in synonyms(entry)]
        missing = list(dict.fromkeys(name for name, _ in names if name not in self._rows))
        if missing:
            chosen = self.protocol
            rows = class_embeddings(
                self.model, missing, chosen.templates, normalise_each=chosen.normalise_each_template
            )
            if not rows.isfinite().all():
                raise UserError(
                    "the text encoder gives NaN: damaged or diverged weights; use another checkpoint"
                )
            self._rows.update(zip(missing, rows, strict=True))
        embeddings = torch.stack([self._rows[name] for name, _ in names])
        for name, _ in names:
            self._rows.move_to_end(name)
        while len(self._rows) > self.capacity:
            self._rows.popitem(last=False)
        return ClassText(embeddings, torch.tensor([index for _, index in names], device=embeddings.device))
