"""upsample_masks against F.interpolate and against two matrix products."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_cases import DTYPES, RESIZES, backend, native_only, random_maps  # noqa: F401

from groupvit_fast import ops


def weights_1d(size_in, size_out):
    """The resampling of one axis as a float64 matrix, from the formula itself."""
    matrix = torch.zeros(size_out, size_in, dtype=torch.float64)
    for row in range(size_out):
        source = max(size_in / size_out * (row + 0.5) - 0.5, 0.0)
        low = min(int(source), size_in - 1)
        matrix[row, low] += 1 - (source - low)
        matrix[row, min(low + 1, size_in - 1)] += source - low
    return matrix


def resized(maps, size):
    """float64 truth by two matrix products."""
    rows, columns = weights_1d(maps.shape[2], size[0]), weights_1d(maps.shape[3], size[1])
    return rows @ maps.detach().cpu().double() @ columns.T


# ---- upsample_masks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("source", "size"), RESIZES)
def test_upsample_is_as_exact_as_eager(source, size, dtype, device):
    maps = random_maps(2, 3, *source, dtype=dtype, device=device)
    result = ops.upsample_masks(maps, size)
    assert result.shape == (2, 3, *size)
    assert result.dtype == dtype
    assert result.is_contiguous()
    truth = resized(maps, size)
    eager = F.interpolate(maps, size=size, mode="bilinear", align_corners=False).cpu().double()
    rounding = torch.finfo(dtype).eps * truth.abs().max().item()
    budget = 2 * (eager - truth).abs().max().item() + rounding
    assert (result.cpu().double() - truth).abs().max().item() <= budget


@pytest.mark.parametrize(("source", "size"), RESIZES)
def test_upsample_gradient_is_the_transpose(source, size, device):
    maps = random_maps(2, 3, *source, dtype=torch.float64, device=device).requires_grad_()
    gradient = random_maps(2, 3, *size, dtype=torch.float64, device=device, seed=1)
    (result,) = torch.autograd.grad(ops.upsample_masks(maps, size), maps, gradient)
    rows, columns = weights_1d(source[0], size[0]), weights_1d(source[1], size[1])
    torch.testing.assert_close(result.cpu(), rows.T @ gradient.cpu() @ columns, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("source", "size"), RESIZES[:4])
def test_upsample_gradient_in_low_precision(source, size, dtype, device):
    maps = random_maps(2, 3, *source, dtype=dtype, device=device).requires_grad_()
    gradient = random_maps(2, 3, *size, dtype=dtype, device=device, seed=1)
    (result,) = torch.autograd.grad(ops.upsample_masks(maps, size), maps, gradient)
    eager_maps = maps.detach().clone().requires_grad_()
    eager = F.interpolate(eager_maps, size=size, mode="bilinear", align_corners=False)
    (eager,) = torch.autograd.grad(eager, eager_maps, gradient)
    rows, columns = weights_1d(source[0], size[0]), weights_1d(source[1], size[1])
    truth = rows.T @ gradient.cpu().double() @ columns
    rounding = torch.finfo(dtype).eps * truth.abs().max().item()
    error = (result.cpu().double() - truth).abs().max().item()
    assert error <= 2 * (eager.cpu().double() - truth).abs().max().item() + rounding


@pytest.mark.parametrize(
    ("source", "size"), [((2, 3), (5, 4)), ((5, 4), (2, 3)), ((3, 2), (3, 5)), ((1, 1), (2, 2))]
)
def test_upsample_passes_gradcheck_twice(source, size, device):
    maps = random_maps(1, 2, *source, dtype=torch.float64, device=device).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: ops.upsample_masks(m, size), maps)
    assert torch.autograd.gradgradcheck(lambda m: ops.upsample_masks(m, size), maps)


def layouts(maps):
    """The same values in other memory layouts."""
    wide = torch.zeros(*maps.shape[:3], maps.shape[3] + 1, dtype=maps.dtype, device=maps.device)
    wide[..., 1:] = maps
    yield maps.contiguous(memory_format=torch.channels_last)
    yield maps.transpose(2, 3).contiguous().transpose(2, 3)
    yield wide[..., 1:]
    yield maps[:1].expand_as(maps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_layout_gives_the_same_result(dtype, device):
    maps = random_maps(2, 4, 6, 5, dtype=dtype, device=device)
    labels = torch.arange(8, device=device).view(2, 4)
    for other in layouts(maps):
        plain = other.clone(memory_format=torch.contiguous_format)
        assert torch.equal(ops.upsample_masks(other, (11, 9)), ops.upsample_masks(plain, (11, 9)))
        assert torch.equal(ops.decode_masks(other, labels, (11, 9)), ops.decode_masks(plain, labels, (11, 9)))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)])
def test_upsample_of_nothing(shape, device):
    maps = torch.zeros(shape, device=device, requires_grad=True)
    result = ops.upsample_masks(maps, (7, 6))
    assert result.shape == (*shape[:2], 7, 6)
    result.sum().backward()
    assert maps.grad.shape == shape


@native_only
def test_equal_size_copies_what_is_not_finite():
    maps = torch.tensor([[[[float("inf"), 1.0], [float("nan"), -float("inf")]]]])
    result = ops.upsample_masks(maps, (2, 2))
    assert result.data_ptr() != maps.data_ptr()
    torch.testing.assert_close(result, maps, equal_nan=True)


def test_upsample_keeps_its_dtype_under_autocast(device):
    maps = random_maps(1, 2, 4, 4, device=device)
    plain = ops.upsample_masks(maps, (8, 8))
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(ops.upsample_masks(maps, (8, 8)), plain)


# ---- one result, however it is computed ------------------------------------------------------------------


@given(
    batch=st.integers(0, 3),
    groups=st.integers(1, 9),
    source=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 140)),
    magnitude=st.sampled_from([1e-30, 1.0, 1e4, 1e30]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_and_magnitude(batch, groups, source, size, magnitude, dtype, seed):
    maps = magnitude * random_maps(batch, groups, *source, dtype=dtype, seed=seed)
    result, truth = ops.upsample_masks(maps, size), resized(maps, size)
    torch.testing.assert_close(result.double(), truth, rtol=0, atol=4e-6 * magnitude)
    winner = ops.decode_masks(maps, torch.arange(groups).expand(batch, groups), size)
    best = truth.max(dim=1).values if batch else truth[:, 0]
    chosen = truth.gather(1, winner.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(chosen, best, rtol=0, atol=8e-6 * magnitude)


def test_bits_do_not_depend_on_threads_or_batch():
    maps, scores = random_maps(5, 6, 9, 11), random_maps(5, 6, 4, seed=1)
    target = torch.randint(0, 4, (5, 70, 90), generator=torch.Generator().manual_seed(3))

    def everything(part=slice(None)):
        leaf = maps[part].clone().requires_grad_()
        result = ops.upsample_masks(leaf, (70, 90))
        (gradient,) = torch.autograd.grad(result.square().sum(), leaf)
        return (
            result.detach(),
            gradient,
            ops.decode_masks(leaf, scores[part], (70, 90), target=target[part])[0],
        )

    before = torch.get_num_threads()
    whole = everything()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(everything(), whole, strict=True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b[3:4]) for a, b in zip(everything(slice(3, 4)), whole, strict=True))


PROBE = """
import hashlib, sys, torch
from groupvit_fast import build_info, ops
digest = hashlib.sha256()
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for size in ((37, 150), (4, 5)):
        generator = torch.Generator().manual_seed(7)
        maps = torch.randn(2, 7, 9, 13, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        result = ops.upsample_masks(maps, size)
        (gradient,) = torch.autograd.grad(result, maps, torch.ones_like(result))
        labels = ops.decode_masks(maps, torch.arange(14).view(2, 7), size)
        for tensor in (result.detach(), gradient, labels):
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
print(build_info()["cpu_level"], digest.hexdigest())
"""


@native_only
def test_every_instruction_set_gives_the_same_bits():

    def run(level):
        environment = os.environ | ({"GROUPVIT_CPU": level} if level else {})
        command = [sys.executable, "-c", PROBE]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        ).stdout.split()

    best, digest = run(None)
    assert len(digest) == hashlib.sha256().digest_size * 2
    for level in ("plain", "avx2"):
        lowered = {"plain": "plain", "avx2": best if best == "plain" else "avx2"}[level]
        assert run(level) == [lowered, digest]


# ---- bad input -------------------------------------------------------------------------------------------

MAPS = torch.zeros(2, 3, 4, 5)
BAD_UPSAMPLE = [
    ((MAPS[0], (8, 8)), r"maps must be \[B, G, h, w\], got shape \[3, 4, 5\]"),
    ((MAPS.int(), (8, 8)), "maps must be float32, .* got torch.int32"),
    ((MAPS[:, :, :0], (8, 8)), "maps must have h >= 1"),
    ((MAPS[..., :0], (8, 8)), "maps must have w >= 1"),
    ((MAPS, (8, 0)), r"size must be two positive numbers \(H, W\), got \(8, 0\)"),
    ((MAPS, (8,)), "size must be two positive numbers"),
    (("maps", (8, 8)), "maps must be a tensor, got str"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_UPSAMPLE)
def test_bad_upsample_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.upsample_masks(*arguments)
