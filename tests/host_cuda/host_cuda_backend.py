"""The operators' CUDA sources as a back end on CPU tensors: the same functions as `torch.ops.groupvit_fast`.

Each function checks nothing (the entry points of csrc/ do that, and are tested elsewhere); it lays out the
results, registers every tensor with the host run, launches, and returns what the operator returns.
"""

from __future__ import annotations

import torch
from host_cuda_launch import STORAGE, AssignParams, AttentionParams, Launch
from host_cuda_library import compiler, library
from torch import Tensor

__all__ = [
    "STORAGE",
    "Launch",
    "available",
    "group_attention_backward",
    "group_attention_forward",
    "gumbel_assign_backward",
    "gumbel_assign_forward",
    "library",
]


def available() -> bool:
    """Whether the sources can be compiled here."""
    return compiler() is not None


def _heads_last(like: Tensor, rows: int) -> Tensor:
    """A result [B, H, rows, D] in memory order [B, rows, H, D]."""
    batch, heads, _, depth = like.shape
    return like.new_empty(batch, rows, heads, depth).transpose(1, 2)


def _attention_params(
    launch: Launch, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> AttentionParams:
    batch, heads, groups, depth = query.shape
    return AttentionParams(
        query=launch.matrices("query", query),
        key=launch.matrices("key", key),
        value=launch.matrices("value", value),
        samples=batch,
        heads=heads,
        groups=groups,
        tokens=key.shape[2],
        depth=depth,
        scale=scale,
        storage=STORAGE[query.dtype],
    )


def group_attention_forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    launch = Launch()
    params = _attention_params(launch, query, key, value, scale)
    output = _heads_last(query, query.shape[2])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    params.output = launch.matrices("output", output, result=True)
    params.lse = launch.pointer("lse", lse, result=True)
    if output.numel() > 0:
        launch.run("group_attention", params)
    return output, lse


def group_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    launch = Launch()
    params = _attention_params(launch, query, key, value, scale)
    grad_query = _heads_last(query, query.shape[2])
    grad_key, grad_value = _heads_last(query, key.shape[2]), _heads_last(query, key.shape[2])
    if query.shape[2] == 0:
        return grad_query, grad_key.zero_(), grad_value.zero_()
    params.output = launch.matrices("output", output)
    params.lse = launch.pointer("lse", lse)
    params.grad_output = launch.matrices("grad_output", grad_output)
    params.grad_query = launch.matrices("grad_query", grad_query, result=True)
    params.grad_key = launch.matrices("grad_key", grad_key, result=True)
    params.grad_value = launch.matrices("grad_value", grad_value, result=True)
    params.workspace = launch.workspace(lse.numel())
    if query.shape[0] * query.shape[1] > 0:
        launch.run("group_attention_backward", params)
    return grad_query, grad_key, grad_value


def _assign_params(
    launch: Launch,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    bias: Tensor | None,
    noise_key: Tensor | None,
    constants: tuple[float, float, float, bool],
) -> AssignParams:
    scale, tau, eps, hard = constants
    batch, groups, channels = query.shape
    return AssignParams(
        query=launch.matrices("query", query),
        key=launch.matrices("key", key),
        value=launch.matrices("value", value),
        bias=launch.pointer("bias", bias),
        noise_key=launch.pointer("noise_key", noise_key),
        samples=batch,
        groups=groups,
        tokens=key.shape[1],
        channels=channels,
        scale=scale,
        tau=tau,
        eps=eps,
        hard=hard,
        storage=STORAGE[query.dtype],
    )


def gumbel_assign_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    bias: Tensor | None,
    noise_key: Tensor | None,
    scale: float,
    tau: float,
    eps: float,
    hard: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    launch = Launch()
    params = _assign_params(launch, query, key, value, bias, noise_key, (scale, tau, eps, hard))
    batch, groups, _ = query.shape
    output = torch.empty(query.shape, dtype=query.dtype)
    index = torch.empty(batch, key.shape[1], dtype=torch.int64)
    count = torch.empty(batch, groups)
    lse = torch.empty(batch, key.shape[1])
    params.output = launch.matrices("output", output, result=True)
    params.index = launch.pointer("index", index, result=True)
    params.count = launch.pointer("count", count, result=True)
    params.lse = launch.pointer("lse", lse, result=True)
    if batch > 0:
        launch.run("gumbel_assign", params)
    return output, index, count, lse


def gumbel_assign_backward(
    grad_output: Tensor,
    grad_count: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    bias: Tensor | None,
    noise_key: Tensor | None,
    output: Tensor,
    index: Tensor,
    count: Tensor,
    lse: Tensor,
    scale: float,
    tau: float,
    eps: float,
    hard: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    launch = Launch()
    params = _assign_params(launch, query, key, value, bias, noise_key, (scale, tau, eps, hard))
    grad_query, grad_key = (
        torch.empty(query.shape, dtype=query.dtype),
        torch.empty(key.shape, dtype=key.dtype),
    )
    grad_value = query.new_empty(0) if value is None else torch.empty(value.shape, dtype=value.dtype)
    grad_bias = query.new_empty(0) if bias is None else torch.empty(bias.shape, dtype=bias.dtype)
    params.output = launch.matrices("output", output)
    params.index = launch.pointer("index", index)
    params.count = launch.pointer("count", count)
    params.lse = launch.pointer("lse", lse)
    params.grad_output = launch.matrices("grad_output", grad_output)
    params.grad_count = launch.pointer("grad_count", grad_count)
    params.grad_query = launch.matrices("grad_query", grad_query, result=True)
    params.grad_key = launch.matrices("grad_key", grad_key, result=True)
    params.grad_value = launch.matrices("grad_value", None if value is None else grad_value, result=True)
    params.grad_bias = launch.pointer("grad_bias", None if bias is None else grad_bias, result=True)
    params.workspace = launch.workspace(count.numel() + lse.numel())
    if query.shape[0] > 0:
        launch.run("gumbel_assign_backward", params)
    return grad_query, grad_key, grad_value, grad_bias
