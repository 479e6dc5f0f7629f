"""group_attention on every back end, against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch
from attention_problem import (
    check,
    heads_last,
    inputs,
    part_of_one_projection,
    rows_an_odd_number_apart,
    transposed,
)
from backends import BACKENDS
from error_budget import leaf
from hypothesis import given, settings
from hypothesis import strategies as st

# B, H, S, L, D: both official stages, one of everything, odd numbers, partial tiles of groups and of tokens.
SHAPES = [
    (2, 6, 64, 196, 64),
    (2, 6, 8, 64, 64),
    (1, 2, 65, 785, 32),
    (2, 3, 7, 37, 59),
    (1, 1, 1, 1, 1),
    (2, 1, 130, 3, 16),
    (1, 2, 1, 129, 80),
    (2, 2, 9, 1, 24),
    (2, 3, 70, 1, 50),
    (1, 2, 3, 600, 50),
    (1, 1, 6, 135, 50),
    (1, 2, 4, 70, 100),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_the_error_budget(backend, shape):
    if math.prod(shape) > backend.largest:
        pytest.skip("too large to run on the host")
    check(backend, shape)


@pytest.mark.parametrize("shape", [(2, 3, 7, 37, 59), (1, 2, 8, 64, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_keep_the_budget(backend, dtype, shape):
    if dtype not in backend.dtypes:
        pytest.skip(f"no {dtype} kernel")
    check(backend, shape, dtype=dtype)


@pytest.mark.parametrize("scale", [0.7, -0.4, 0.0])
def test_scale(backend, scale):
    check(backend, (1, 2, 7, 37, 16), scale=scale)


def test_gradcheck(backend):
    if torch.float64 not in backend.dtypes:
        pytest.skip("no float64 kernel")
    tensors = [leaf(t) for t in inputs((2, 2, 3, 4, 5), dtype=torch.float64)[:3]]
    assert torch.autograd.gradcheck(lambda q, k, v: backend.group_attention(q, k, v, scale=0.6), tensors)


# ---- documented corner cases -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 4, 5), (2, 0, 3, 4, 5), (2, 2, 0, 4, 5), (2, 2, 3, 0, 5)], ids=str
)
def test_empty_inputs(backend, shape):
    *tensors, gradient = inputs(shape, device=backend.device)
    tensors = [leaf(t) for t in tensors]
    output = backend.group_attention(*tensors)
    assert output.shape == gradient.shape
    assert (output == 0).all()
    for tensor, grad in zip(tensors, torch.autograd.grad(output, tensors, gradient), strict=True):
        assert grad.shape == tensor.shape
        assert (grad == 0).all()


@pytest.mark.parametrize("groups", [2, 5])
@pytest.mark.parametrize("tokens", [40, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_token_spoils_its_head_only(backend, bad, tokens, groups):
    query, key, value, _ = inputs((2, 3, groups, tokens, 16), device=backend.device)
    query[1, 2], key[1, 2, tokens // 2] = query[1, 2].abs(), bad
    output = backend.group_attention(query, key, value)
    assert output[1, 2].isnan().all()
    assert torch.isfinite(output[0]).all()
    assert torch.isfinite(output[1, :2]).all()


@pytest.mark.parametrize("groups", [2, 5])
def test_a_token_at_minus_infinity_is_ignored(backend, groups):
    """Also when whole tiles of tokens are."""
    query, key, value, _ = inputs((1, 2, groups, 300, 16), device=backend.device)
    query[..., 0], key[:, :, :140, 0] = query[..., 0].abs() + 1, -math.inf
    wanted = backend.group_attention(query, key[:, :, 140:], value[:, :, 140:])
    torch.testing.assert_close(backend.group_attention(query, key, value), wanted, rtol=2e-6, atol=2e-6)
    key[..., 0] = -math.inf
    assert backend.group_attention(query, key, value).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [3, 7, 21])  # odd: where groups are paired, the last one is with nothing
def test_a_token_that_no_group_reads_has_no_gradient(backend, groups, dtype):
    query, key, value, gradient = inputs((1, 2, groups, 40, 16), dtype=dtype, device=backend.device)
    query[..., 0], key[:, :, 5, 0] = query[..., 0].abs() + 1, -math.inf
    value = leaf(value)
    (grad,) = torch.autograd.grad(backend.group_attention(query, key, value), value, gradient)
    assert (grad[:, :, 5] == 0).all()
    assert torch.isfinite(grad).all()


# ---- memory layouts --------------------------------------------------------------------------------------


LAYOUTS = [heads_last, part_of_one_projection, transposed, rows_an_odd_number_apart]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [2, 7, 20])  # each another layout of logits in the CPU kernel
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_memory_layout_does_not_matter(backend, layout, groups, dtype):
    *tensors, gradient = inputs((2, 3, groups, 37, 16), dtype=dtype, device=backend.device)
    results = []
    for change in (lambda t: t, layout):
        leaves = [leaf(change(t)) for t in tensors]
        output = backend.group_attention(*leaves)
        results.append([output, *torch.autograd.grad(output, leaves, change(gradient))])
    for one, other in zip(*results, strict=True):
        if backend.name == "reference":  # torch picks its matrix product by layout
            torch.testing.assert_close(one, other)
        else:
            assert torch.equal(one, other)


def test_merging_the_heads_of_the_output_is_a_view(backend):
    if backend.name == "reference":
        pytest.skip("the reference promises values only")
    output = backend.group_attention(*inputs((2, 3, 7, 37, 16), device=backend.device)[:3])
    assert output.transpose(1, 2).is_contiguous()


# ---- properties ------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*(st.integers(1, top) for top in (2, 3, 140, 280, 70))),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    spread=st.sampled_from([0.0, 0.1, 3.0, 100.0, 1e4]),
)
def test_any_problem_stays_in_the_budget(shape, dtype, spread):
    backend = next((b for b in reversed(BACKENDS) if b.compiled), BACKENDS[0])
    torch.manual_seed(1)
    check(backend, shape, dtype=dtype, spread=spread)
