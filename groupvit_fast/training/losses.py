"""The losses: image-caption contrast, image against several single-noun prompts, and SigLIP's of both.

Shapes: B images of this process, W processes, K texts an image, G groups, D embedding width. Every loss
contrasts with the texts and images of all processes; the mean over processes is the loss of the global
batch. Everything here is at least float32, whatever autocast does outside.

Memory: a process compares its own B rows with the gathered ones in pieces of `SIMILARITIES_AT_ONCE`, which
are computed again in the backward pass, so nothing of size B x WB is kept. No target matrix is ever made.

Sources: GroupViT paper, sections 3.2 (contrastive) and 3.3 (multi-label); "Sigmoid Loss for Language Image
Pre-Training" (Zhai et al. 2023). Matching prompts with single groups (`GROUP_SHARPNESS`) is not of the
GroupViT paper: it is multiple-instance learning as in Dietterich et al. 1997 with the usual log-sum-exp for
the maximum.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from groupvit_fast.training.distributed import gather, gather_own_grad, gather_with_grad, rank, world_size

MAX_SCALE = 100.0
"""Largest factor on the cosine similarities, as in CLIP."""
GROUP_SHARPNESS = 10.0
"""How close the soft maximum over groups is to the maximum; on cosines, so between a mean and a choice."""
SIMILARITIES_AT_ONCE = 2**24
"""Similarities that are in memory at a time."""


@dataclass(frozen=True)
class Gathering:
    """How the losses see other processes; the names are open_clip's.

    local_loss: each process compares its own rows with everybody's; else everybody's with everybody's, the
    same loss on every process at W times the work. with_grad: gradients flow back through the gather, so
    that the gradient is that of the global batch. Without it a process's rows get no gradient from the
    others' losses, and without `local_loss` as well all gradients are 1/W of that, as in open_clip.
    """

    local_loss: bool = True
    with_grad: bool = True

    def everyone(self, rows: Tensor) -> Tensor:
        return gather_with_grad(rows) if self.with_grad else gather_own_grad(rows)


EXACT = Gathering()


def similarity_scale(logit_scale: Tensor) -> Tensor:
    """exp(`logit_scale`), clamped at 100; 0-dim. The clamp stops the gradient above the limit."""
    return _wide(logit_scale).exp().clamp(max=MAX_SCALE)


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    *,
    labels: Tensor | None = None,
    gathering: Gathering = EXACT,
) -> Tensor:
    """Symmetric cross-entropy between images and their captions; a 0-dim tensor, float32 or wider.

    image and text [B,D] need not be normalised; `logit_scale` is in log space. With `labels` [B] (int64),
    captions of equal label are one text that belongs to several images.
    """
    labels = None if labels is None else labels[:, None]
    return _matching_loss(image[:, None], text[:, None], logit_scale, labels, gathering)


def multi_label_loss(
    image: Tensor, prompts: Tensor, labels: Tensor, logit_scale: Tensor, *, gathering: Gathering = EXACT
) -> Tensor:
    """Cross-entropy between images [B,D] and their prompts [B,K,D] with soft targets; 0-dim.

    `image` may also be the groups of each image [B,G,D]: a prompt then matches an image as well as it
    matches the best of its groups (a soft maximum), so a noun has to be found in one place.

    `labels` [B,K] (int64) say which prompts are the same text, in the global batch. An image's target is
    uniform over its distinct prompts, a prompt's over the images that have it; each distinct prompt counts
    once. When all prompts differ this is the formula of the paper.
    """
    groups = image if image.dim() == 3 else image[:, None]
    return _matching_loss(groups, prompts, logit_scale, labels, gathering)


def sigmoid_loss(
    image: Tensor,
    texts: Tensor,
    labels: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    gathering: Gathering = EXACT,
) -> Tensor:
    """SigLIP: is this text one of this image's? One yes-no question a pair, summed over texts; 0-dim.

    image [B,D] or groups [B,G,D], texts [B,K,D], `labels` [B,K] as in `multi_label_loss`: a text that an
    image has by another's row is no wrong answer, and a distinct text counts once. With K = 1 and different
    labels this is the published formula. Own images meet everybody's texts, so `local_loss` changes nothing.
    """
    groups = image if image.dim() == 3 else image[:, None]
    with torch.autocast(groups.device.type, enabled=False):
        groups, texts = _normalised(groups), _normalised(texts)
        scale, bias = similarity_scale(logit_scale), logit_bias.to(groups.dtype)
        everyone = gather(labels.contiguous())
        share = _label_weights(labels, everyone, rank(), world_size(), groups.dtype)[0]

        def wrong(groups: Tensor, texts: Tensor, scale: Tensor, columns: tuple[Tensor, Tensor]) -> Tensor:
            theirs, share = columns
            yes = (labels[:, :, None] == theirs).any(1)
            logits = scale * soft_maximum(groups @ texts.T) + bias
            return (F.softplus(torch.where(yes, -logits, logits)) * share).sum(1)

        theirs = gathering.everyone(texts).flatten(0, 1)
        pieces = _in_pieces(wrong, groups, theirs, scale, everyone.flatten(), share)
        return torch.stack(pieces).sum(0).mean()


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


def _wide(tensor: Tensor) -> Tensor:
    """float32, or float64 left as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _normalised(rows: Tensor) -> Tensor:
    return F.normalize(_wide(rows), dim=-1)


def _in_pieces(
    function: Callable[..., Tensor], groups: Tensor, texts: Tensor, scale: Tensor, *columns: Tensor
) -> list[Tensor]:
    """`function(groups, piece of texts, scale, pieces of columns)` for every piece of the texts [M,D].

    With more than one piece, none of its similarities is kept: they are computed again in the backward pass.
    """
    size = max(1, SIMILARITIES_AT_ONCE // max(1, groups.shape[0] * groups.shape[1]))
    if texts.shape[0] <= size:
        return [function(groups, texts, scale, columns)]
    return [
        checkpoint(function, groups, piece, scale, rest, use_reentrant=False, preserve_rng_state=False)
        for piece, *rest in zip(texts.split(size), *(column.split(size) for column in columns), strict=True)
    ]


def _over_texts(groups: Tensor, texts: Tensor, scale: Tensor, columns: tuple[Tensor, ...]) -> Tensor:
    """log of the sum over texts, [B]; the first of `columns` [M], if any, is a text's log weight."""
    logits = scale * soft_maximum(groups @ texts.T)
    return (logits + columns[0] if columns else logits).logsumexp(1)


def _over_images(texts: Tensor, groups: Tensor, scale: Tensor) -> list[Tensor]:
    """log of the sum over images [M,G,D], for texts [N,D]: a list of [N], one for each piece of images."""

    def normaliser(texts: Tensor, groups: Tensor, scale: Tensor) -> Tensor:
        return (scale * soft_maximum(groups @ texts.T)).logsumexp(0)

    size = max(1, SIMILARITIES_AT_ONCE // max(1, texts.shape[0] * groups.shape[1]))
    if groups.shape[0] <= size:
        return [normaliser(texts, groups, scale)]
    return [
        checkpoint(normaliser, texts, piece, scale, use_reentrant=False, preserve_rng_state=False)
        for piece in groups.split(size)
    ]


def _matching_loss(
    groups: Tensor, text: Tensor, logit_scale: Tensor, labels: Tensor | None, gathering: Gathering
) -> Tensor:
    """Half the sum of both directions' soft-target cross-entropy; groups [B,G,D], text [B,K,D].

    The positives need no target matrix: an image meets its own texts on this process, so the target part
    of the cross-entropy is a [B,K] table of products, and only the normalisers see the gathered batch.
    """
    with torch.autocast(groups.device.type, enabled=False):
        groups, text = _normalised(groups), _normalised(text)
        all_groups, all_texts = gathering.everyone(groups), gathering.everyone(text)
        everyone = None if labels is None else gather(labels.contiguous())
        place, places = rank(), world_size()
        if not gathering.local_loss:
            groups, text, labels, place, places = all_groups, all_texts, everyone, 0, 1
        scale = similarity_scale(logit_scale)
        own = scale * soft_maximum(groups @ text.transpose(1, 2))
        weights: tuple[Tensor, ...] = ()
        per_image = torch.full_like(own, 1 / own.shape[1])
        per_text = torch.full_like(own, 1 / own.numel())
        if labels is not None:
            share, per_image, per_text = _label_weights(labels, everyone, place, places, own.dtype)
            # not -inf for a repetition: a piece of nothing else would make its gradient NaN
            weights = (share.log().clamp(min=-1e4),)
        theirs = all_texts.flatten(0, 1)
        if places == 1 and groups.shape[0] * groups.shape[1] * len(theirs) <= SIMILARITIES_AT_ONCE:
            # one process compares the same pairs in both directions
            logits = scale * soft_maximum(groups @ theirs.T)
            texts_of_image = [(logits + weights[0] if weights else logits).logsumexp(1)]
            images_of_text = [logits.logsumexp(0)]
        else:
            texts_of_image = _in_pieces(_over_texts, groups, theirs, scale, *weights)
            images_of_text = _over_images(text.flatten(0, 1), all_groups, scale)
        image_loss = (torch.stack(texts_of_image).logsumexp(0) - (per_image * own).sum(1)).mean()
        text_loss = (per_text * (torch.stack(images_of_text).logsumexp(0).view_as(own) - own)).sum()
        return 0.5 * (image_loss + text_loss)


def _label_weights(
    labels: Tensor, everyone: Tensor, place: int, places: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """How much each prompt counts, given labels [B,K], number `place` of `places` parts of `everyone`'s.

    share [W*B*K]: 1/n for a text that n images have, 0 for its repetitions in one image, so that the
        shares of a distinct text sum to 1;
    per_image [B,K]: an image's target, uniform over its distinct prompts;
    per_text [B,K]: weight of each local prompt in the mean over the distinct prompts of the global batch
        (times the number of parts, because they are averaged).
    """
    # column k repeats an earlier one of the same image?
    earlier = (everyone[:, :, None] == everyone[:, None, :]).tril(-1).any(2)
    first = (~earlier).long().flatten()
    flat = everyone.flatten()
    ordered, order = flat.sort()
    # number of images with a label = sum of `first` over the run of that label in sorted order
    running = F.pad(first[order].cumsum(0), (1, 0))
    left, right = torch.searchsorted(ordered, flat), torch.searchsorted(ordered, flat, right=True)
    share = first.to(dtype) / (running[right] - running[left])
    here = slice(labels.numel() * place, labels.numel() * (place + 1))
    local_first = first[here].view_as(labels).to(dtype)
    per_image = local_first / local_first.sum(1, keepdim=True)
    per_text = share[here].view_as(labels) / share.sum() * places
    return share, per_image, per_text
