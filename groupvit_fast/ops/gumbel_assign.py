"""`gumbel_assign`: tokens to groups by straight-through Gumbel-softmax, and the mean of each group."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from . import library, reference, registration
from .checks import apply_autocast, check_at_least_one, check_noise_key, check_number, check_tensors
from .reference import Assignment


def gumbel_assign(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    tau: float = 1.0,
    hard: bool = True,
    noise_key: Tensor | None = None,
    eps: float = 1.0,
) -> Assignment:
    """Assign every token to a group and average the tokens of each group (GroupViT, section 3.2).

    Args:
        query: groups, [B, S, C].
        key, value: tokens, [B, L, C]; pass one tensor twice and it is read once.
        bias: added to the similarities of a group, [B, S] (lets a module absorb its key projection).
        scale: factor of the similarities, default C ** -0.5.
        tau: temperature of the softmax over groups, above 0.
        hard: one-hot assignment with the gradient of the soft one (straight-through); False: the soft one.
        noise_key: int64[2] (key, offset) on the device of the query: standard Gumbel noise from Philox4x32-10
            is added to the logits. None: no noise.
        eps: added to the token count before the division, at least 0.

    Returns:
        Assignment(output [B, S, C], index [B, L] int64, count [B, S] float32). Ties go to the lowest group;
        output and count carry gradients, both straight-through where hard. A token with a NaN or +inf logit,
        or only -inf, makes the outputs and counts of its sample NaN.

    Raises:
        ValueError: wrong rank, size, dtype, device or number, naming the argument.
    """
    query, key, value, bias = apply_autocast(query, key, value, bias)
    sizes = check_tensors(
        ("query", query, "BSC"), ("key", key, "BLC"), ("value", value, "BLC"), ("bias", bias, "BS")
    )
    check_at_least_one("query", "S", sizes)
    check_at_least_one("query", "C", sizes)
    check_noise_key(noise_key, query.device)
    scale = check_number("scale", sizes["C"] ** -0.5 if scale is None else scale)
    tau = check_number("tau", tau, above=0.0)
    eps = check_number("eps", eps, at_least=0.0)
    if not registration.runs_native(query):
        if noise_key is not None and registration.is_mapped():
            raise registration.mapped_noise("gumbel_assign")
        return reference.gumbel_assign(
            query, key, value, bias=bias, scale=scale, tau=tau, hard=bool(hard), noise_key=noise_key, eps=eps
        )
    own_value = None if value is key else value
    arguments = (query, key, own_value, bias, noise_key, scale, tau, eps, bool(hard))
    operator = torch.ops.groupvit_fast.gumbel_assign_forward.default
    if not registration.runs_directly():
        return Assignment(*operator(*arguments)[:3])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments[:4]):
        return Assignment(*_Assign.apply(*arguments)[:3])
    with registration.below_autograd():
        return Assignment(*operator(*arguments)[:3])


def gumbel_noise(noise_key: Tensor, shape: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """The float32 noise that `gumbel_assign` adds to logits of `shape` (B, S, L), to inspect it."""
    if len(shape) != 3 or min(shape) < 0:
        raise ValueError(f"shape must be (B, S, L), got {tuple(shape)}")
    if isinstance(noise_key, Tensor) and device is not None:
        noise_key = noise_key.to(device)
    if noise_key is None:
        raise ValueError("noise_key must be a tensor int64[2], key and offset, got None")
    check_noise_key(noise_key, getattr(noise_key, "device", torch.device("cpu")))
    return reference.gumbel_noise(noise_key, shape)


def soft_assignment(
    query: Tensor, key: Tensor, *, bias: Tensor | None = None, scale: float | None = None, tau: float = 1.0
) -> Tensor:
    """Soft assignment map without noise: softmax over S of scale * (query @ key^T + bias) / tau.

    query [B, S, C], key [B, L, C], bias [B, S] -> [B, S, L], dtype of the query; scale defaults to C ** -0.5.
    """
    query, key, bias = apply_autocast(query, key, bias)
    sizes = check_tensors(("query", query, "BSC"), ("key", key, "BLC"), ("bias", bias, "BS"))
    check_at_least_one("query", "S", sizes)
    check_at_least_one("query", "C", sizes)
    scale = check_number("scale", sizes["C"] ** -0.5 if scale is None else scale)
    tau = check_number("tau", tau, above=0.0)
    return reference.soft_assignment(query, key, bias=bias, scale=scale, tau=tau)


def compose_assignments(maps: Sequence[Tensor]) -> Tensor:
    """Product of soft maps listed from the first stage: [B,S1,L], [B,S2,S1], ... -> last @ ... @ first."""
    if not maps:
        raise ValueError("maps must list at least one [B, S, L] tensor, got none")
    check_tensors(("maps[0]", maps[0], "BSL"))
    for stage, (earlier, later) in enumerate(pairwise(maps)):
        check_tensors((f"maps[{stage}]", earlier, "BSL"), (f"maps[{stage + 1}]", later, "BGS"))
    return reference.compose_assignments(maps)


def _register() -> None:
    """Tell PyTorch shapes, gradients and batching of the operator; its schema is in library_cpu.cpp."""

    @registration.fake("gumbel_assign_forward")
    def _(query, key, value, bias, noise_key, scale, tau, eps, hard):
        batch, groups, channels = query.shape
        tokens, statistic = key.shape[1], registration.statistic_dtype(query)
        return (
            query.new_empty((batch, groups, channels)),
            query.new_empty((batch, tokens), dtype=torch.int64),
            query.new_empty((batch, groups), dtype=statistic),
            query.new_empty((batch, tokens) if query.is_cuda else (0,), dtype=statistic),
        )

    @registration.fake("gumbel_assign_backward")
    def _(grad_output, grad_count, query, key, value, bias, noise_key, *results_and_constants):
        return (
            query.new_empty(query.shape),
            query.new_empty(key.shape),
            query.new_empty((0,) if value is None else value.shape),
            query.new_empty((0,) if bias is None else bias.shape),
        )

    torch.library.register_autograd(
        f"{registration.NAMESPACE}::gumbel_assign_forward", _backward, setup_context=_save
    )
    registration.refuse_second_derivative("gumbel_assign")
    registration.register_batching("gumbel_assign_forward", fixed=(4,))
    registration.register_batching("gumbel_assign_backward", fixed=(6,))


def _save(ctx, inputs, output) -> None:
    query, key, value, bias, noise_key, *ctx.constants = inputs
    result, index, count, lse = output
    ctx.mark_non_differentiable(index, lse)
    ctx.set_materialize_grads(False)
    if lse.dim() == 1:  # the CPU's backward makes both again
        index = lse = None
    ctx.save_for_backward(query, key, value, bias, noise_key, result, index, count, lse)


def _backward(ctx, grad_output, _index, grad_count, _lse):
    if grad_output is None and grad_count is None:
        return (None,) * 9
    query, key, value, bias, *rest = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(query)
    operator = torch.ops.groupvit_fast.gumbel_assign_backward.default
    with registration.in_backward():
        grad_query, grad_key, grad_value, grad_bias = operator(
            grad_output, grad_count, query, key, value, bias, *rest, *ctx.constants
        )
    grad_value = None if value is None else grad_value
    grad_bias = None if bias is None else grad_bias
    return grad_query, grad_key, grad_value, grad_bias, None, None, None, None, None


class _Assign(torch.autograd.Function):
    """The registered gradient, without the dispatcher's way through Python, which outlasts small calls."""

    @staticmethod
    def forward(ctx, *inputs):
        with registration.below_autograd():
            results = torch.ops.groupvit_fast.gumbel_assign_forward.default(*inputs)
        _save(ctx, inputs, results)
        return results

    backward = staticmethod(_backward)


if library.HAS_CPU:
    _register()
