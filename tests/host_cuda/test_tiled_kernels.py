"""What is special to the tiled CUDA kernels: paths by size, the same bits in any company, every byte touched.

Values and gradients of both operators in general are in tests/ops, where `host_cuda` is one of the back ends.
"""

from __future__ import annotations

import pytest
import torch
from error_budget import assert_close
from far_apart import far_apart
from host_cuda_backend import (
    available,
    group_attention_backward,
    group_attention_forward,
    gumbel_assign_backward,
    gumbel_assign_forward,
)
from host_cuda_launch import Launch
from host_cuda_library import HostCudaError

from groupvit_fast.ops import reference

pytestmark = pytest.mark.skipif(not available(), reason="no host compiler")
SCALE, TAU, EPS = 0.3, 0.7, 1.0
NOISE_KEY = torch.tensor([0x123456789ABCDEF, -5])


def attention_inputs(shape, dtype):
    """query, key, value, gradient for B, H, S, L, D."""
    batch, heads, groups, tokens, depth = shape
    generator = torch.Generator().manual_seed(1)
    rows = (groups, tokens, tokens, groups)
    return [torch.randn(batch, heads, n, depth, generator=generator).to(dtype) for n in rows]


def assign_inputs(shape, dtype):
    """query, key, value, bias, gradient for B, S, L, C."""
    batch, groups, tokens, channels = shape
    generator = torch.Generator().manual_seed(2)
    rows = (groups, tokens, tokens, groups)
    tensors = [torch.randn(batch, n, channels, generator=generator).to(dtype) for n in rows]
    return [*tensors[:3], torch.randn(batch, groups, generator=generator).to(dtype), tensors[3]]


def attend(query, key, value, gradient):
    scale = query.shape[-1] ** -0.5
    output, lse = group_attention_forward(query, key, value, scale)
    return output, lse, *group_attention_backward(gradient, query, key, value, output, lse, scale)


def assign(query, key, value, bias, gradient, hard=True):
    inputs, constants = (query, key, value, bias, NOISE_KEY if hard else None), (SCALE, TAU, EPS, hard)
    results = gumbel_assign_forward(*inputs, *constants)
    return *results, *gumbel_assign_backward(gradient, None, *inputs, *results, *constants)


def assign_shared(query, key, _, bias, gradient):
    return assign(query, key, None, bias, gradient)


# ---- paths that only some sizes take -----------------------------------------------------------------------


def eager_attention(query, key, value, gradient):
    """Output and gradients in the dtype of the inputs throughout."""
    leaves = [t.clone().requires_grad_() for t in (query, key, value)]
    output = (query.shape[-1] ** -0.5 * (leaves[0] @ leaves[1].mT)).softmax(dim=-1) @ leaves[2]
    return output, *torch.autograd.grad(output, leaves, gradient)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 1, 5, 70, 264), torch.bfloat16),  # a head too wide to keep the queries in shared memory
        ((1, 1, 5, 70, 136), torch.float32),
        ((1, 2, 17, 66, 64), torch.float16),  # more groups than one warp holds
        ((1, 1, 66, 66, 20), torch.bfloat16),  # two tiles of groups; rows too short for 16-byte copies
        ((2, 2, 16, 64, 8), torch.float32),  # exactly one warp, exactly one tile
    ],
    ids=str,
)
def test_attention_by_size(shape, dtype):
    inputs = attention_inputs(shape, dtype)
    output, _, *gradients = attend(*inputs)
    truth = eager_attention(*(t.double() for t in inputs))
    eager = eager_attention(*inputs)
    names = ("output", "gradient of query", "gradient of key", "gradient of value")
    for name, result, exact, plain in zip(names, (output, *gradients), truth, eager, strict=True):
        assert_close(name, result, exact, plain, factor=3.0)


def eager_assign(query, key, value, bias, gradient):
    leaves = [t.clone().requires_grad_() for t in (query, key, value, bias)]
    logits = SCALE * (leaves[0] @ leaves[1].mT + leaves[3].unsqueeze(-1))
    soft = (logits / TAU).softmax(dim=1)
    output = (soft @ leaves[2]) / (soft.sum(dim=-1, keepdim=True) + EPS)
    return output, *torch.autograd.grad(output, leaves, gradient)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 3, 5, 450), torch.bfloat16),  # more channels than a block sums at a time
        ((1, 3, 5, 210), torch.float32),
        ((1, 66, 66, 72), torch.float16),  # two tiles of groups, two of tokens, two of channels
        ((1, 7, 65, 9), torch.bfloat16),  # odd rows: no 16-byte copies
    ],
    ids=str,
)
def test_soft_assignment_by_size(shape, dtype):
    inputs = assign_inputs(shape, dtype)
    output, _, _, _, *gradients = assign(*inputs, hard=False)
    truth = eager_assign(*(t.double() for t in inputs))
    eager = eager_assign(*inputs)
    names = ("output", "gradient of query", "gradient of key", "gradient of value", "gradient of bias")
    for name, result, exact, plain in zip(names, (output, *gradients), truth, eager, strict=True):
        assert_close(name, result, exact, plain, factor=3.0)


def test_hard_assignment_counts_over_several_tiles():
    """130 tokens in three tiles, 70 groups in two: winners and counts are those of the reference."""
    query, key, value, bias, _ = assign_inputs((2, 70, 130, 24), torch.float32)
    output, index, count, _ = gumbel_assign_forward(query, key, value, bias, NOISE_KEY, SCALE, TAU, EPS, True)
    wanted = reference.gumbel_assign(
        query, key, value, bias=bias, scale=SCALE, tau=TAU, hard=True, noise_key=NOISE_KEY, eps=EPS
    )
    assert torch.equal(index, wanted.index)
    assert torch.equal(count, wanted.count)
    torch.testing.assert_close(output, wanted.output)


# ---- the same bits -----------------------------------------------------------------------------------------

OPERATORS = {
    "attention": (attend, attention_inputs, (4, 1, 9, 67, 24)),
    "assign": (assign, assign_inputs, (4, 9, 67, 24)),
    "assign, values are keys": (assign_shared, assign_inputs, (4, 9, 67, 24)),
}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_sample_does_not_depend_on_its_batch(operator, dtype):
    """Nor on the round of the grid that it falls in: the host run has fewer blocks than work items here."""
    run, make_inputs, shape = OPERATORS[operator]
    inputs = make_inputs(shape, dtype)
    together = run(*inputs)
    alone = run(*(t[:1] for t in inputs))
    for whole, single in zip(together, alone, strict=True):
        assert torch.equal(whole[:1], single)
    for first, second in zip(together, run(*inputs), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_way_of_copying_does_not_matter(operator, dtype):
    """Inputs that start at an odd address are copied element by element."""
    run, make_inputs, shape = OPERATORS[operator]
    inputs = make_inputs((1, *shape[1:]), dtype)
    moved = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in inputs]
    assert all(t.data_ptr() % 16 != 0 for t in moved)
    for one, other in zip(run(*inputs), run(*moved), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("operator", OPERATORS)
def test_samples_may_be_more_than_32_bits_apart(operator):
    run, make_inputs, shape = OPERATORS[operator]
    inputs = make_inputs((2, *shape[1:]), torch.bfloat16)
    moved = [t if t.dim() == 2 else far_apart(t) for t in inputs]  # the bias is copied to be contiguous
    for one, other in zip(run(*inputs), run(*moved), strict=True):
        assert torch.equal(one, other)


# ---- every byte --------------------------------------------------------------------------------------------

COMMON = ["query", "key", "value", "output", "lse", "grad_output"]
COMMON += ["grad_query", "grad_key", "grad_value", "workspace"]
TENSORS = {"attention": COMMON, "assign": [*COMMON, "bias", "noise_key", "index", "count", "grad_bias"]}
ALL_TENSORS = [(operator, name) for operator, names in TENSORS.items() for name in names]


@pytest.mark.parametrize(("operator", "name"), ALL_TENSORS)
def test_kernels_touch_the_last_byte_of_every_tensor(operator, name, monkeypatch):
    """... and would be seen to go past it: with one byte withheld, the host run reports the access."""
    register = Launch._register

    def withheld(self, own_name, tensor, writable):
        address = register(self, own_name, tensor, writable)
        if own_name == name:
            _, start, size, *rest = self._tensors[-1]
            self._tensors[-1] = (own_name, start, size - 1, *rest)
        return address

    monkeypatch.setattr(Launch, "_register", withheld)
    run, make_inputs, shape = OPERATORS[operator]
    with pytest.raises(HostCudaError, match=f"past the end of {name}"):
        run(*make_inputs((1, *shape[1:]), torch.float32))
