"""`group_attention`: group tokens read image tokens (cross-attention without mask or dropout)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import library, reference, registration
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
    if not registration.runs_native(query):
        return reference.group_attention(query, key, value, scale=scale)
    operator = torch.ops.groupvit_fast.group_attention_forward.default
    if not registration.runs_directly():
        return operator(query, key, value, scale)[0]
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return _Attention.apply(query, key, value, scale)[0]
    with registration.below_autograd():
        return operator(query, key, value, scale)[0]


def _register() -> None:
    """Tell PyTorch shapes, gradients and batching of the operator; its schema is in library_cpu.cpp."""

    @registration.fake("group_attention_forward")
    def _(query, key, value, scale):
        statistic = registration.statistic_dtype(query)
        return _heads_last(query), query.new_empty(query.shape[:3], dtype=statistic)

    @registration.fake("group_attention_backward")
    def _(grad_output, query, key, value, output, lse, scale):
        return _heads_last(query), _heads_last(key), _heads_last(value)

    torch.library.register_autograd(
        f"{registration.NAMESPACE}::group_attention_forward", _backward, setup_context=_save
    )
    registration.refuse_second_derivative("group_attention")
    registration.register_batching("group_attention_forward")
    registration.register_batching("group_attention_backward")


def _heads_last(like: Tensor) -> Tensor:
    """A result [B, H, rows, D] in memory order [B, rows, H, D]: merging the heads is then a view."""
    batch, heads, rows, depth = like.shape
    return like.new_empty((batch, rows, heads, depth)).transpose(1, 2)


def _save(ctx, inputs, output) -> None:
    query, key, value, ctx.scale = inputs
    result, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, result, lse)


def _backward(ctx, grad_output, _):
    if grad_output is None:
        return None, None, None, None
    operator = torch.ops.groupvit_fast.group_attention_backward.default
    with registration.in_backward():
        gradients = operator(grad_output, *ctx.saved_tensors, ctx.scale)
    return *gradients, None


class _Attention(torch.autograd.Function):
    """The registered gradient, without the dispatcher's way through Python, which outlasts small calls."""

    @staticmethod
    def forward(ctx, query, key, value, scale):
        with registration.below_autograd():
            result = torch.ops.groupvit_fast.group_attention_forward.default(query, key, value, scale)
        _save(ctx, (query, key, value, scale), result)
        return result

    backward = staticmethod(_backward)


if library.HAS_CPU:
    _register()
