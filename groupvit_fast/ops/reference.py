"""The definition of every operator, in tensor notation: oracle of the tests, baseline of the benches.

Nothing here is fused or clever; PyTorch's own autograd gives the gradients. The compiled kernels state the
same formulas a second time and are tested against this file. Arguments are taken as checked (the public
functions do that). Low-precision inputs are computed in float32 and rounded once at the end; float64 stays
float64.

Shape letters: B batch, H heads, S groups, L image tokens, D head dim, C channels, G groups of a map,
K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW_32 = 0xFFFFFFFF


class Assignment(NamedTuple):
    """Result of `gumbel_assign`; `output` and `count` carry gradients."""

    output: Tensor  # [B, S, C], dtype of the query
    index: Tensor  # [B, L] int64: the winning group of each token
    count: Tensor  # [B, S] float32 (float64 for float64 inputs): tokens, or probability mass, per group


def _compute(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _full_precision(tensor: Tensor) -> torch.autocast:
    """Autocast off: the formulas below fix their own precision."""
    return torch.autocast(tensor.device.type, enabled=False)


def group_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """softmax over L of scale * query @ key^T, times value: [B,H,S,D] x [B,H,L,D] -> [B,H,S,D]."""
    with _full_precision(query):
        logits = scale * (_compute(query) @ _compute(key).transpose(-1, -2))
        return (logits.softmax(dim=-1) @ _compute(value)).to(query.dtype)


def _multiply_32(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of constant * word, in int64 without reaching bit 63."""
    low_part = constant * (word & 0xFFFF)
    high_part = constant * (word >> 16)
    high = (high_part + (low_part >> 16)) >> 16
    low = (low_part + ((high_part & 0xFFFF) << 16)) & _LOW_32
    return high, low


def philox4x32_10(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 with ten rounds (Salmon et al., SC 2011): four counter words, two key words -> four words.

    Words are unsigned 32-bit values held in int64 tensors of one common (broadcast) shape.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply_32(_PHILOX_MULTIPLIERS[0], c0)
        high1, low1 = _multiply_32(_PHILOX_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _PHILOX_KEY_STEPS[0]) & _LOW_32, (k1 + _PHILOX_KEY_STEPS[1]) & _LOW_32
    return c0, c1, c2, c3


def gumbel_noise(noise_key: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard Gumbel noise, float32 [B, S, L], a pure function of (noise_key, element, S, L).

    One Philox call gives the noise of four consecutive groups of one token: call number
    n = (b * ceil(S/4) + s//4) * L + l, word s % 4; the Philox key is noise_key[0], the upper half of the
    counter noise_key[1]. The top 24 bits of a word, 0 counting as 1, make a uniform number in the open
    interval (0, 1).
    """
    batch, groups, tokens = shape
    quads = (groups + 3) // 4
    call = torch.arange(batch * quads * tokens, dtype=torch.int64, device=noise_key.device)
    low, high = noise_key & _LOW_32, (noise_key >> 32) & _LOW_32
    counter = (call & _LOW_32, call >> 32, low[1].expand_as(call), high[1].expand_as(call))
    words = philox4x32_10(counter, (low[0], high[0]))
    words = torch.stack([word.view(batch, quads, tokens) for word in words], dim=2)
    words = words.view(batch, 4 * quads, tokens)[:, :groups]
    uniform = (words >> 8).clamp_min(1).float() * 2.0**-24
    return -torch.log(-torch.log(uniform))


def assignment_logits(query: Tensor, key: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """scale * (query @ key^T + bias), [B, S, L] in float32 (float64 for float64 inputs)."""
    similarity = _compute(query) @ _compute(key).transpose(-1, -2)
    if bias is not None:
        similarity = similarity + _compute(bias).unsqueeze(-1)
    return scale * similarity


def gumbel_assign(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None,
    scale: float,
    tau: float,
    hard: bool,
    noise_key: Tensor | None,
    eps: float,
) -> Assignment:
    """Straight-through Gumbel-softmax assignment of tokens to groups and mean of each group (GroupViT, 3.2).

    The hard value is one_hot + (soft - soft), so it is exactly 0 or 1, its gradient is that of soft, and a
    column without a proper softmax (NaN or +inf logit, or only -inf) makes every group of its sample NaN.
    """
    with _full_precision(query):
        z = assignment_logits(query, key, bias, scale)
        if noise_key is not None:
            z = z + gumbel_noise(noise_key, z.shape)
        z = z / tau
        index = z.detach().argmax(dim=1)
        assign = z.softmax(dim=1)
        if hard:
            one_hot = torch.zeros_like(assign).scatter_(1, index.unsqueeze(1), 1.0)
            assign = one_hot + (assign - assign.detach())
        count = assign.sum(dim=-1)
        output = (assign @ _compute(value)) / (count + eps).unsqueeze(-1)
    return Assignment(output.to(query.dtype), index, count)


def soft_assignment(query: Tensor, key: Tensor, *, bias: Tensor | None, scale: float, tau: float) -> Tensor:
    """softmax over S of the un-noised logits / tau: the map that segmentation reads, [B, S, L]."""
    with _full_precision(query):
        return (assignment_logits(query, key, bias, scale) / tau).softmax(dim=1).to(query.dtype)


def compose_assignments(maps: Sequence[Tensor]) -> Tensor:
    """Product of the stage maps, last stage leftmost: [B,S1,L], [B,S2,S1], ... -> [B, S_last, L]."""
    composed = maps[0]
    for stage_map in maps[1:]:
        composed = stage_map @ composed
    return composed


def upsample_masks(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize, align_corners=False, no antialiasing: [B,G,h,w] -> [B,G,H,W]."""
    with _full_precision(maps):
        return F.interpolate(_compute(maps), size=size, mode="bilinear", align_corners=False).to(maps.dtype)


def group_labels(scores: Tensor, background_threshold: Tensor | float | None) -> Tensor:
    """The label each group gives to its pixels: scores [B,G,K] -> [B,G] int64; labels [B,G] pass through.

    Without a threshold the best class k has label k. With one, label 0 is background, class k is k + 1, and a
    group whose best score is below the threshold ([B] or a number) is background.
    """
    if scores.dim() == 2:
        return scores
    best, label = scores.max(dim=-1)
    if background_threshold is None:
        return label
    threshold = torch.as_tensor(background_threshold, dtype=best.dtype, device=best.device)
    foreground = best >= threshold.reshape(-1, 1)
    return torch.where(foreground, label + 1, torch.zeros_like(label))


def decode_masks(
    maps: Tensor,
    scores: Tensor,
    size: tuple[int, int],
    *,
    background_threshold: Tensor | float | None = None,
    target: Tensor | None = None,
    num_classes: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Low-resolution group maps to labels: upsample, argmax over G (lowest index wins), label of that group.

    maps [B,G,h,w], scores [B,G,K] or labels [B,G] -> labels [B,H,W] int64. With a target [B,H,W] also the
    confusion matrix [num_classes, num_classes] int64 (row: target, column: prediction), where pixels whose
    target or prediction is outside 0..num_classes-1 (ignored, 255) are not counted.
    """
    winner = upsample_masks(_compute(maps), size).argmax(dim=1)
    labels = group_labels(scores, background_threshold).gather(1, winner.flatten(1)).view_as(winner)
    if target is None:
        return labels
    if num_classes is None:
        num_classes = scores.shape[-1] + (background_threshold is not None)
    return labels, confusion_matrix(labels, target, num_classes)


def confusion_matrix(labels: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Count (target, prediction) pairs inside 0..num_classes-1: int64 [num_classes, num_classes]."""
    target = target.long()
    counted = (target >= 0) & (target < num_classes) & (labels >= 0) & (labels < num_classes)
    pair = target[counted] * num_classes + labels[counted]
    return torch.bincount(pair, minlength=num_classes**2).view(num_classes, num_classes)
