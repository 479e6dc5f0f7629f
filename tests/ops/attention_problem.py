"""Random problems for group_attention, in several memory layouts, and how exactly they must be solved."""

from __future__ import annotations

import torch
from error_budget import check_budget

from groupvit_fast.ops import reference


def inputs(shape, dtype=torch.float32, device="cpu", spread=2.0):
    """query, key, value and a gradient; the logits have a standard deviation of about `spread`."""
    batch, heads, groups, tokens, depth = shape
    tensors = [torch.randn(batch, heads, rows, depth) for rows in (groups, tokens, tokens, groups)]
    tensors[0] *= spread
    return [t.to(device, dtype) for t in tensors]


def rounding_floors(query, key, value, gradient, scale):
    """Rounding of the logits, of float32 sums whose terms cancel, of the output that the backward reads."""
    tiny = torch.finfo(torch.float64 if query.dtype == torch.float64 else torch.float32).eps
    q, k, v, g = (t.detach().cpu().double() for t in (query, key, value, gradient))
    logits = scale * q @ k.mT
    share = logits.softmax(dim=-1)
    inexact = tiny + tiny * logits.abs().max().item()
    read_back = (g * (share @ v)).abs().sum(-1, keepdim=True) * torch.finfo(query.dtype).eps
    d_logits = abs(scale) * share * (inexact * g.abs() @ v.abs().mT + read_back)
    floors = {"query": d_logits @ k.abs(), "key": d_logits.mT @ q.abs()}
    floors |= {"value": inexact * share.mT @ g.abs(), "output": inexact * share @ v.abs()}
    return {name: floor.max().item() for name, floor in floors.items()}


def check(backend, shape, scale=None, **given):
    """The whole comparison for one random problem: output and gradients against the reference in float64."""
    check_tensors(backend, inputs(shape, device=backend.device, **given), scale)


def check_tensors(backend, tensors, scale=None):
    """The same for given query, key, value and gradient."""
    query, key, value, gradient = tensors
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    check_budget(
        lambda *tensors: backend.group_attention(*tensors, scale=scale),
        lambda *tensors: reference.group_attention(*tensors, scale=factor),
        {"query": query, "key": key, "value": value},
        gradient,
        rounding_floors(query, key, value, gradient, factor),
    )


# ---- memory layouts --------------------------------------------------------------------------------------


def heads_last(tensor):
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def part_of_one_projection(tensor):
    """Query, key and value of all heads in one row, as a fused projection leaves them."""
    batch, heads, rows, depth = tensor.shape
    wide = torch.zeros(batch, rows, 3, heads, depth, dtype=tensor.dtype, device=tensor.device)
    wide[:, :, 1] = tensor.transpose(1, 2)
    return wide[:, :, 1].transpose(1, 2)


def transposed(tensor):
    return tensor.mT.contiguous().mT


def rows_an_odd_number_apart(tensor):
    wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1, dtype=tensor.dtype, device=tensor.device)
    wide[..., 1:] = tensor
    return wide[..., 1:]
