"""The steps of zero-shot segmentation: resize, windows, group maps, and the scores that name a group.

They are those of the released GroupViT evaluation (Xu et al., CVPR 2022, section 3.3, and its configuration
files). `reference.py` states the whole algorithm for one image; `batch.py` and `decode.py` are the fast path.

Shapes: B windows, G final groups, N names, K classes, h x w the resized image, H x W the original image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from groupvit_fast import ops
from groupvit_fast.data.images import IMAGENET_MEAN, IMAGENET_STD
from groupvit_fast.segmentation.prompts import ClassText
from groupvit_fast.segmentation.protocols import Protocol
from groupvit_fast.segmentation.resize import resize_photo


class Box(NamedTuple):
    """A window in pixels of the resized image; `bottom` and `right` are exclusive."""

    top: int
    left: int
    bottom: int
    right: int

    def slices(self) -> tuple[slice, slice]:
        return slice(self.top, self.bottom), slice(self.left, self.right)


def resized_size(height: int, width: int, protocol: Protocol) -> tuple[int, int]:
    """Height and width after resizing: short side as wanted unless the long side would pass its limit."""
    scale = protocol.short_side / min(height, width)
    if protocol.long_side is not None:
        scale = min(scale, protocol.long_side / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def prepare(image: Tensor, protocol: Protocol) -> Tensor:
    """uint8 [H, W, 3] to the float32 [3, h, w] that the model takes: resized and normalised."""
    pixels = resize_photo(image, resized_size(*image.shape[:2], protocol))
    mean = torch.tensor(IMAGENET_MEAN, device=pixels.device).view(3, 1, 1) * 255
    std = torch.tensor(IMAGENET_STD, device=pixels.device).view(3, 1, 1) * 255
    return (pixels - mean) / std


def window_boxes(height: int, width: int, protocol: Protocol) -> list[Box]:
    """The windows of a resized image, row by row."""
    if protocol.mode == "whole":
        return [Box(0, 0, height, width)]
    return [
        Box(top, left, bottom, right)
        for top, bottom in window_spans(height, protocol.crop, protocol.stride)
        for left, right in window_spans(width, protocol.crop, protocol.stride)
    ]


def window_spans(length: int, crop: int, stride: int) -> list[tuple[int, int]]:
    """Spans of `crop` every `stride`; the last is shifted back inside, a short side is one short span."""
    count = max(length - crop + stride - 1, 0) // stride + 1
    ends = [min(index * stride + crop, length) for index in range(count)]
    return [(max(end - crop, 0), end) for end in ends]


def low_resolution_maps(encoding: NamedTuple) -> Tensor:
    """Soft maps of the final groups at patch resolution, [B, G, *grid]: the stage maps multiplied."""
    return ops.compose_assignments([stage.float() for stage in encoding.maps]).unflatten(-1, encoding.grid)


def learnt_scale(model: torch.nn.Module) -> Tensor:
    """The temperature of the contrastive loss as a factor on cosines, at most 100 as in training."""
    return model.logit_scale.detach().float().exp().clamp(max=100)


def group_class_scores(encoding: NamedTuple, text: ClassText, protocol: Protocol, scale: Tensor) -> Tensor:
    """Score of every class for every group, [B, G, K]: the table that decoding reads.

    P = softmax over all names of scale x cosine(group, name). Gated scores multiply it with the softmax over
    the names of the window's `top_k` classes, which its mean feature chooses. A class with synonyms has the
    score of its best name. Late scores are scale x cosine for every name, [B, G, N]: their softmax follows
    at the size of the original image.
    """
    scale = scale if protocol.logit_scale is None else protocol.logit_scale
    logits = scale * F.normalize(encoding.groups.float(), dim=-1) @ text.embeddings.T
    if protocol.class_scores == "late":
        return logits
    scores = logits.softmax(dim=-1)
    if protocol.class_scores == "gated":
        mean_logits = scale * F.normalize(encoding.image.float(), dim=-1) @ text.embeddings.T
        kept = best_classes(mean_logits, text, protocol.top_k)
        scores = scores * logits.masked_fill(~kept[:, None, :], -torch.inf).softmax(dim=-1)
    return best_name_of_class(scores, text)


def best_classes(mean_logits: Tensor, text: ClassText, top_k: int | None) -> Tensor:
    """bool [B, N]: the names of the `top_k` classes whose best name scores highest in `mean_logits`."""
    classes = best_name_of_class(mean_logits.softmax(dim=-1), text)
    kept = torch.zeros_like(classes, dtype=torch.bool)
    count = min(top_k or text.num_classes, text.num_classes)
    kept.scatter_(1, classes.topk(count, dim=-1).indices, True)
    return kept[:, text.owner]


def best_name_of_class(scores: Tensor, text: ClassText) -> Tensor:
    """[..., N] scores of names -> [..., K] scores of classes, the maximum over synonyms."""
    if text.num_classes == len(text.owner):
        return scores
    owner = text.owner.expand_as(scores)
    result = scores.new_full((*scores.shape[:-1], text.num_classes), -torch.inf)
    return result.scatter_reduce(-1, owner, scores, "amax")
