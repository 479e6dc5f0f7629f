"""Zero-shot segmentation as the released GroupViT evaluation does it, for one image, written for reading.

Source: Xu et al., "GroupViT: Semantic Segmentation Emerges from Text Supervision" (CVPR 2022), section 3.3,
and the released configuration files: the order of the operations, batches of one window, two passes of the
encoder (one for the maps, one for the features) and a score map of every class. `batch.py` and `decode.py`
give the same labels without all that; the tests hold the two together, and `benchmarks/eval_bench.py`
compares their speed.

Shapes: G final groups, N names, K classes, C score channels, h x w the resized image or a window of it, H x W
the original image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from groupvit_fast.segmentation.prompts import ClassText
from groupvit_fast.segmentation.protocols import Protocol
from groupvit_fast.segmentation.segment import prepare, window_boxes


@torch.no_grad()
def segment_image(model: torch.nn.Module, image: Tensor, text: ClassText, protocol: Protocol) -> Tensor:
    """Label every pixel of `image` (uint8 [H, W, 3], RGB) with a class of `text`.

    Returns: int64 [H, W]; class k is label k, or, where the protocol adds a background channel, label k + 1
    with label 0 for background. `protocol` must have been resolved; the model must be in eval mode.
    """
    return segment_pixels(model, prepare(image, protocol), image.shape[:2], text, protocol)


def segment_pixels(
    model: torch.nn.Module, pixels: Tensor, size: tuple[int, int], text: ClassText, protocol: Protocol
) -> Tensor:
    """`segment_image` from the resized and normalised pixels [3, h, w]; size: (H, W) of the labels."""
    height, width = pixels.shape[-2:]
    total = coverage = 0
    for box in window_boxes(height, width, protocol):
        rows, columns = box.slices()
        window = pixels[None, :, rows, columns]
        scores = window_scores(regions(model, window), named_groups(model, window, text, protocol), protocol)
        # Zeros around the window: the sums over windows grow in the frame of the whole image.
        frame = (box.left, width - box.right, box.top, height - box.bottom)
        total = total + F.pad(scores, frame)
        coverage = coverage + F.pad(torch.ones_like(scores[0]), frame)
    scores = F.interpolate((total / coverage)[None], size=size, mode="bilinear")[0]
    return label_pixels(scores, text, protocol)


def regions(model: torch.nn.Module, window: Tensor) -> Tensor:
    """window [1, 3, h, w] -> one-hot maps of the final groups [h, w, G]: which group a pixel belongs to."""
    encoding = model.encode_groups(window)
    maps, resized = None, []
    for assignment in encoding.maps:
        maps = assignment if maps is None else assignment @ maps
        grid = maps.unflatten(-1, encoding.grid).float()
        # The released code brings the maps of every stage to pixels, although only the last one names them.
        resized.append(F.interpolate(grid, size=window.shape[-2:], mode="bilinear", align_corners=False))
    strongest = resized[-1][0].argmax(dim=0)
    return F.one_hot(strongest, maps.shape[1]).float()


def named_groups(model: torch.nn.Module, window: Tensor, text: ClassText, protocol: Protocol) -> Tensor:
    """window [1, 3, h, w] -> the scores of each final group for the classes [G, K] (late: names [G, N])."""
    encoding = model.encode_groups(window)
    scale = protocol.logit_scale or model.logit_scale.float().exp().clamp(max=100).item()
    logits = scale * F.normalize(encoding.groups[0].float(), dim=-1) @ text.embeddings.T
    if protocol.class_scores == "late":
        return logits
    scores = logits.softmax(dim=-1)
    if protocol.class_scores == "gated":
        mean = scale * F.normalize(encoding.image[0].float(), dim=-1) @ text.embeddings.T
        class_of_window = best_name(mean.softmax(dim=-1), text)
        best = class_of_window.topk(min(protocol.top_k or text.num_classes, text.num_classes)).indices
        kept = torch.isin(text.owner, best)
        scores = logits.masked_fill(~kept, -torch.inf).softmax(dim=-1) * scores
    return best_name(scores, text)


def window_scores(membership: Tensor, table: Tensor, protocol: Protocol) -> Tensor:
    """One-hot maps [h, w, G] and scores of the groups [G, K] -> score maps [C, h, w]."""
    scores = membership @ table
    if protocol.has_background_channel:
        if protocol.background_rule == "constant":
            background = torch.full_like(scores[..., 0], protocol.background_threshold)
        else:
            # Every group counts for the limit, also one that owns no pixel.
            limit = min(protocol.background_threshold, table.max().item())
            background = (scores.amax(dim=-1) < limit).float()
        scores = torch.cat([background[..., None], scores], dim=-1)
    return scores.permute(2, 0, 1)


def label_pixels(scores: Tensor, text: ClassText, protocol: Protocol) -> Tensor:
    """Score maps [C, H, W] -> labels [H, W]."""
    if protocol.class_scores != "late":
        return scores.argmax(dim=0)
    probability = best_name(scores.softmax(dim=0).permute(1, 2, 0), text)
    if protocol.area_threshold is not None:
        areas = F.one_hot(probability.argmax(dim=-1), text.num_classes).sum(dim=(0, 1))
        areas[0] = 0  # background has no part in it
        small = areas <= protocol.area_threshold * areas.sum()
        small[0] = False
        probability = probability.masked_fill(small, 0)
    best, labels = probability.max(dim=-1)
    if protocol.background_threshold is not None:
        labels[best < protocol.background_threshold] = 0
    return labels


def best_name(scores: Tensor, text: ClassText) -> Tensor:
    """[..., N] scores of names -> [..., K] scores of classes, each the score of its best name."""
    if text.num_classes == len(text.owner):
        return scores
    return torch.stack(
        [scores[..., text.owner == index].amax(dim=-1) for index in range(text.num_classes)], dim=-1
    )
