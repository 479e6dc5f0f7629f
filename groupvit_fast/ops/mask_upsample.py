"""`upsample_masks` and `decode_masks`: from low-resolution group maps to pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import library, reference, registration
from .checks import check_at_least_one, check_tensors


def upsample_masks(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps bilinearly (align_corners=False, no antialiasing), up or down; differentiable.

    Args:
        maps: [B, G, h, w], float32, float64, bfloat16 or float16.
        size: (H, W) of the result.

    Returns:
        [B, G, H, W] in the dtype of the maps, computed in float32 (float64 for float64).

    Raises:
        ValueError: wrong rank, size or dtype, naming the argument.
    """
    height, width = _check_maps_and_size(maps, size)
    if not library.runs_native(maps) or registration.needs_formula():
        if maps.shape[1] == 0:  # which F.interpolate refuses
            return maps[:, :, :1, :1].expand(-1, -1, height, width)
        return reference.upsample_masks(maps, (height, width))
    return torch.ops.groupvit_fast.upsample_masks(maps, height, width)


def decode_masks(
    maps: Tensor,
    scores: Tensor,
    size: Sequence[int],
    *,
    background_threshold: Tensor | float | None = None,
    target: Tensor | None = None,
    num_classes: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Group maps to class labels in one pass; nothing of size G x H x W or K x H x W is held.

    Each pixel takes the group whose resized map is largest there (the lowest index wins ties) and gets the
    label of that group, as the public evaluator of GroupViT does.

    Args:
        maps: [B, G, h, w], resized as by `upsample_masks`.
        scores: [B, G, K] class scores of each group (the best class is its label; lowest index wins ties), or
            the labels themselves, [B, G] int64.
        size: (H, W) of the labels.
        background_threshold: a number or [B]. Label 0 is then background, class k has label k + 1, and a
            group whose best score does not reach the threshold is background.
        target: [B, H, W] integer labels to count against.
        num_classes: size of the confusion matrix; by default K, plus 1 with a background threshold.

    Returns:
        labels [B, H, W] int64; with a target (labels, confusion), confusion [num_classes, num_classes] int64,
        row target, column label. Pixels whose target or label is outside 0..num_classes-1 are not counted.

    Raises:
        ValueError: wrong rank, size, dtype or device, naming the argument.
    """
    height, width = _check_maps_and_size(maps, size)
    threshold = _check_scores(maps, scores, background_threshold)
    num_classes = _check_target(maps, scores, (height, width), threshold is not None, target, num_classes)
    if not library.runs_native(maps):
        options = {"background_threshold": threshold, "target": target, "num_classes": num_classes}
        return reference.decode_masks(maps, scores, (height, width), **options)
    counted = target if target is None else target.long()
    labels, confusion = torch.ops.groupvit_fast.decode_masks(
        maps.detach(), scores.detach(), height, width, threshold, counted, num_classes
    )
    return labels if target is None else (labels, confusion)


def _check_maps_and_size(maps: Tensor, size: Sequence[int]) -> tuple[int, int]:
    sizes = check_tensors(("maps", maps, "BGhw"))
    check_at_least_one("maps", "h", sizes)
    check_at_least_one("maps", "w", sizes)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be two positive numbers (H, W), got {tuple(size)}")
    return size[0], size[1]


def _check_scores(maps: Tensor, scores: Tensor, threshold: Tensor | float | None) -> Tensor | None:
    """Check the scores or labels; return the threshold as a [B] tensor in the dtype of the scores."""
    batch, groups = maps.shape[:2]
    if groups < 1:
        raise ValueError("maps must have G >= 1, got G = 0")
    if not isinstance(scores, Tensor):
        raise ValueError(f"scores must be a tensor, got {type(scores).__name__}")
    known = scores.dim() == 2
    if scores.shape[:2] != (batch, groups) or not (known or (scores.dim() == 3 and scores.shape[2] > 0)):
        wanted = f"[{batch}, {groups}, K] (K >= 1) or labels [{batch}, {groups}]"
        raise ValueError(f"scores must be {wanted}, got shape {list(scores.shape)}")
    if known != (scores.dtype == torch.int64) or not (known or scores.is_floating_point()):
        raise ValueError(f"scores must be floating [B, G, K] or int64 [B, G], got {scores.dtype}")
    if scores.device != maps.device:
        raise ValueError(f"scores must be on the device of maps, {maps.device}, got {scores.device}")
    if threshold is None:
        return None
    if known:
        raise ValueError("background_threshold needs scores [B, G, K], got labels [B, G]")
    if not isinstance(threshold, Tensor):
        return scores.new_full((batch,), float(threshold))
    if threshold.shape not in ((), (batch,)) or threshold.device != maps.device:
        came = f"shape {list(threshold.shape)} on {threshold.device}"
        raise ValueError(f"background_threshold must be a number or [{batch}] on {maps.device}, got {came}")
    return threshold.detach().to(scores.dtype).expand(batch)


def _check_target(
    maps: Tensor,
    scores: Tensor,
    size: tuple[int, int],
    background: bool,
    target: Tensor | None,
    num_classes: int | None,
) -> int:
    """Check the target; return the size of the confusion matrix, 0 without a target."""
    if target is None:
        return 0
    wanted = (maps.shape[0], *size)
    if not isinstance(target, Tensor) or target.is_floating_point() or tuple(target.shape) != wanted:
        came = f"{target.dtype} {list(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(f"target must be integers {list(wanted)}, got {came}")
    if target.device != maps.device:
        raise ValueError(f"target must be on the device of maps, {maps.device}, got {target.device}")
    if num_classes is None and scores.dim() == 2:
        raise ValueError("num_classes must be given with labels [B, G]: they do not tell how many there are")
    num_classes = scores.shape[-1] + int(background) if num_classes is None else num_classes
    if num_classes < 1:
        raise ValueError(f"num_classes must be positive, got {num_classes}")
    return num_classes


def _register() -> None:
    """Tell PyTorch shapes, gradients and batching of the operators; their schemas are in library_cpu.cpp."""
    for name in ("upsample_masks", "upsample_masks_backward"):
        registration.fake(name)(lambda maps, h, w: maps.new_empty((*maps.shape[:2], h, w)))
        torch.library.register_vmap(f"{registration.NAMESPACE}::{name}", _batched(name))

    @registration.fake("decode_masks")
    def _(maps, scores, height, width, background_threshold, target, num_classes):
        labels = maps.new_empty((maps.shape[0], height, width), dtype=torch.int64)
        table = 0 if target is None else num_classes
        return labels, maps.new_empty((table, table), dtype=torch.int64)

    # The two are each other's transpose, so each is the gradient of the other, to any order.
    for name, other in (
        ("upsample_masks", "upsample_masks_backward"),
        ("upsample_masks_backward", "upsample_masks"),
    ):
        torch.library.register_autograd(
            f"{registration.NAMESPACE}::{name}", _transposed(other), setup_context=_keep_size
        )


def _keep_size(ctx, inputs, output) -> None:
    ctx.size = inputs[0].shape[2:]


def _transposed(name: str):
    def backward(ctx, gradient: Tensor):
        return getattr(torch.ops.groupvit_fast, name)(gradient, *ctx.size), None, None

    return backward


def _batched(name: str):
    def rule(info, in_dims, maps: Tensor, height: int, width: int):
        maps = maps.movedim(in_dims[0], 0)
        result = getattr(torch.ops.groupvit_fast, name)(maps.flatten(0, 1), height, width)
        return result.unflatten(0, maps.shape[:2]), 0

    return rule


if library.HAS_CPU:
    _register()
