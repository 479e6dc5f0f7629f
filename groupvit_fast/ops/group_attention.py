"""`group_attention`: group tokens read image tokens (cross-attention without mask or dropout)."""

from __future__ import annotations

from torch import Tensor

from . import reference
from .checks import apply_autocast, check_at_least_one, check_number, check_tensors


def group_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None) -> Tensor:
    """softmax over L of scale * query @ key^T, times value.

    Args:
        query: [B, H, S, D].
        key, value: [B, H, L, D].
        scale: factor of the logits, default D ** -0.5.

    Returns:
        [B, H, S, D] in the dtype of the query; with L = 0 zeros, as a product over nothing.

    Raises:
        ValueError: wrong rank, size, dtype, device or number, naming the argument.
    """
    query, key, value = apply_autocast(query, key, value)
    sizes = check_tensors(("query", query, "BHSD"), ("key", key, "BHLD"), ("value", value, "BHLD"))
    check_at_least_one("query", "D", sizes)
    scale = check_number("scale", sizes["D"] ** -0.5 if scale is None else scale)
    return reference.group_attention(query, key, value, scale=scale)
