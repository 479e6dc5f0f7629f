"""Random problems for gumbel_assign, and how exactly a back end must solve them."""

from __future__ import annotations

import math

import pytest
import torch
from backends import Backend
from error_budget import check_budget

from groupvit_fast.ops import reference

NOISE = (0x123456789ABCDEF, -5)


def inputs(shape, dtype=torch.float32, device="cpu", shared=False, bias=True, spread=2.0):
    """query, key, value, bias and a gradient; the logits have a standard deviation of about `spread`."""
    batch, groups, tokens, channels = shape
    tensors = [torch.randn(batch, rows, channels) for rows in (groups, tokens, tokens, groups)]
    tensors[0] *= spread
    tensors.insert(3, torch.randn(batch, groups) if bias else None)
    query, key, value, bias, gradient = (None if t is None else t.to(device, dtype) for t in tensors)
    return query, key, None if shared else value, bias, gradient


def skip_if_too_large(backend: Backend, shape):
    if math.prod(shape) > backend.largest:
        pytest.skip("too large to run on the host")


def noise_key(backend, value=NOISE):
    return torch.tensor(value, device=backend.device)


def completed(query, options):
    options = {"scale": None, "tau": 1.0, "eps": 1.0, "hard": True, "noise_key": None} | options
    return options | {"scale": query.shape[-1] ** -0.5 if options["scale"] is None else options["scale"]}


def rounding_floors(query, key, value, bias, gradient, options):
    """Rounding of float32 sums whose terms cancel, of logits and noise, of the output the backward reads.

    The noise is float32 on every back end, and its two logarithms may differ in the last place.
    """
    options = completed(query, options)
    tiny = torch.finfo(torch.float64 if query.dtype == torch.float64 else torch.float32).eps
    q, k, b, g = (None if t is None else t.detach().cpu().double() for t in (query, key, bias, gradient))
    v = k if value is None else value.detach().cpu().double()
    result = reference.gumbel_assign(q, k, v, bias=b, **options)
    mass = result.count.unsqueeze(-1) + options["eps"]
    z = reference.assignment_logits(q, k, b, options["scale"])
    inexact = tiny + tiny * z.abs().max().item() / options["tau"]
    if options["noise_key"] is not None:
        noise = reference.gumbel_noise(options["noise_key"], z.shape)
        z = z + noise
        inexact += torch.finfo(torch.float32).eps * noise.abs().max().item() / options["tau"]
    soft = (z / options["tau"]).softmax(dim=1)
    hard = torch.nn.functional.one_hot(z.argmax(dim=1), z.shape[1]).mT.double()
    share = (hard if options["hard"] else soft) / mass
    read_back = (g * result.output).abs().sum(-1, keepdim=True) * torch.finfo(query.dtype).eps
    term = soft * (inexact * (g.abs() @ v.abs().mT) + read_back) / mass
    d_logits = options["scale"] / options["tau"] * (term + soft * term.sum(dim=1, keepdim=True))
    floors = {"query": d_logits @ k.abs(), "key": d_logits.mT @ q.abs(), "bias": d_logits.sum(-1)}
    floors |= {"output": inexact * share @ v.abs(), "value": inexact * share.mT @ g.abs()}
    if value is None:
        floors["key"] = floors["key"] + floors["value"]
    return {name: floor.max().item() if floor.numel() else 0.0 for name, floor in floors.items()}


def check(backend, shape, options, **given):
    """The whole comparison for one random problem: output and gradients against the reference in float64."""
    check_tensors(backend, inputs(shape, device=backend.device, **given), options)


def check_tensors(backend, tensors, options):
    """The same for given query, key, value, bias and gradient; value and bias may be None."""
    query, key, value, bias, gradient = tensors
    noise = options.get("noise_key")
    cpu_options = options if noise is None else options | {"noise_key": noise.cpu()}

    def kernel(query, key, value, bias):
        return backend.gumbel_assign(query, key, key if value is None else value, bias=bias, **options).output

    def truth(query, key, value, bias):
        value = key if value is None else value
        return reference.gumbel_assign(query, key, value, bias=bias, **completed(query, cpu_options)).output

    named = {"query": query, "key": key, "value": value, "bias": bias}
    floors = rounding_floors(query, key, value, bias, gradient, cpu_options)
    check_budget(kernel, truth, named, gradient, floors)
