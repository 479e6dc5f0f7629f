"""The two losses: image-caption contrast, and image against several single-noun prompts.

Shapes: B images of this process, W processes, K texts an image, D embedding width. Both losses contrast
with the texts and images of all processes and let gradients flow through the gather; the mean over
processes is the loss of the global batch. Everything here is float32, whatever autocast does outside.

Sources: GroupViT paper, sections 3.2 (contrastive) and 3.3 (multi-label). Matching prompts with single
groups (`GROUP_SHARPNESS`) is not of the paper: it is multiple-instance learning as in Dietterich et al. 1997
with the usual log-sum-exp for the maximum.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from groupvit_fast.training.distributed import gather, gather_with_grad, rank, world_size

MAX_SCALE = 100.0
"""Largest factor on the cosine similarities, as in CLIP."""
GROUP_SHARPNESS = 10.0
"""How close the soft maximum over groups is to the maximum; on cosines, so between a mean and a choice."""


def similarity_scale(logit_scale: Tensor) -> Tensor:
    """exp(`logit_scale`), clamped at 100; 0-dim float32. The clamp stops the gradient above the limit."""
    return logit_scale.float().exp().clamp(max=MAX_SCALE)


def contrastive_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor, *, labels: Tensor | None = None
) -> Tensor:
    """Symmetric cross-entropy between images and their captions; a 0-dim float32 tensor.

    image and text [B,D] need not be normalised; `logit_scale` is in log space. With `labels` [B] (int64),
    captions of equal label are one text that belongs to several images.
    """
    labels = None if labels is None else labels[:, None]
    return _matching_loss(image[:, None], text[:, None], logit_scale, labels)


def multi_label_loss(image: Tensor, prompts: Tensor, labels: Tensor, logit_scale: Tensor) -> Tensor:
    """Cross-entropy between images [B,D] and their prompts [B,K,D] with soft targets; 0-dim float32.

    `image` may also be the groups of each image [B,G,D]: a prompt then matches an image as well as it
    matches the best of its groups (a soft maximum), so a noun has to be found in one place.

    `labels` [B,K] (int64) say which prompts are the same text, in the global batch. An image's target is
    uniform over its distinct prompts, a prompt's over the images that have it; each distinct prompt counts
    once. When all prompts differ this is the formula of the paper.
    """
    groups = image if image.dim() == 3 else image[:, None]
    return _matching_loss(groups, prompts, logit_scale, labels)


def text_labels(texts: Tensor, text_index: Tensor) -> Tensor:
    """Labels for `text_index` [B,K] into the unique token rows `texts` [U,T]: equal text, equal label.

    The row number will do in one process. Rows of other processes are compared by a 64-bit hash of their
    tokens, so that no token has to be sent; zero padding does not change it.
    """
    if world_size() == 1:
        return text_index
    # int64 products wrap around, which is what a multiplicative hash wants
    return (texts * _hash_factors(texts.device)[: texts.shape[1]]).sum(1)[text_index]


@functools.cache
def _hash_factors(device: torch.device, length: int = 1024) -> Tensor:
    """Odd random int64 numbers, more than any context is long."""
    generator = torch.Generator().manual_seed(0x5EED)
    return (torch.randint(-(2**63), 2**63 - 1, (length,), generator=generator) | 1).to(device)


def soft_maximum(similarity: Tensor) -> Tensor:
    """Soft maximum of cosines over groups, [B,G,N] -> [B,N]: at most log(G) / `GROUP_SHARPNESS` too low."""
    groups = similarity.shape[1]
    if groups == 1:
        return similarity[:, 0]
    return ((GROUP_SHARPNESS * similarity).logsumexp(1) - math.log(groups)) / GROUP_SHARPNESS


def _matching_loss(groups: Tensor, text: Tensor, logit_scale: Tensor, labels: Tensor | None) -> Tensor:
    """Half the sum of both directions' soft-target cross-entropy; groups [B,G,D], text [B,K,D].

    The positives need no target matrix: an image meets its own texts on this process, so the target part
    of the cross-entropy is a [B,K] table of products, and only the normalisers see the gathered batch.
    """
    with torch.autocast(groups.device.type, enabled=False):
        groups = F.normalize(groups.float(), dim=-1)
        text = F.normalize(text.float(), dim=-1)
        all_groups, all_texts = gather_with_grad(groups), gather_with_grad(text)
        scale = similarity_scale(logit_scale)
        own = scale * soft_maximum(groups @ text.transpose(1, 2))
        to_texts = scale * soft_maximum(groups @ all_texts.flatten(0, 1).T)
        # one process compares the same pairs in both directions
        to_images = to_texts
        if world_size() > 1:
            to_images = scale * soft_maximum(all_groups @ text.flatten(0, 1).T)
        images_of_text = to_images.logsumexp(0).view_as(own)
        if labels is None:
            per_image, per_text = (
                torch.full_like(own, 1 / own.shape[1]),
                torch.full_like(own, 1 / own.numel()),
            )
        else:
            share, per_image, per_text = _label_weights(labels)
            to_texts = to_texts + share.log()
        image_loss = (to_texts.logsumexp(1) - (per_image * own).sum(1)).mean()
        text_loss = (per_text * (images_of_text - own)).sum()
        return 0.5 * (image_loss + text_loss)


def _label_weights(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How much each prompt counts, given labels [B,K]; three float32 tensors.

    share [W*B*K]: 1/n for a text that n images have, 0 for its repetitions in one image, so that the
        shares of a distinct text sum to 1;
    per_image [B,K]: an image's target, uniform over its distinct prompts;
    per_text [B,K]: weight of each local prompt in the mean over the distinct prompts of the global batch
        (times W, because processes are averaged).
    """
    everyone = gather(labels.contiguous())
    # column k repeats an earlier one of the same image?
    earlier = (everyone[:, :, None] == everyone[:, None, :]).tril(-1).any(2)
    first = (~earlier).long().flatten()
    flat = everyone.flatten()
    ordered, order = flat.sort()
    # number of images with a label = sum of `first` over the run of that label in sorted order
    running = F.pad(first[order].cumsum(0), (1, 0))
    left, right = torch.searchsorted(ordered, flat), torch.searchsorted(ordered, flat, right=True)
    share = first.float() / (running[right] - running[left])
    here = slice(labels.numel() * rank(), labels.numel() * (rank() + 1))
    local_first = first[here].view_as(labels).float()
    per_image = local_first / local_first.sum(1, keepdim=True)
    per_text = share[here].view_as(labels) / share.sum() * world_size()
    return share, per_image, per_text
