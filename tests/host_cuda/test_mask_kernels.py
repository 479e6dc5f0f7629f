"""The CUDA kernels of upsample_masks and decode_masks, run on the CPU, against the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from host_cuda_library import compiler
from host_cuda_masks import decode_masks, upsample_masks, upsample_masks_backward

from groupvit_fast.ops import reference

pytestmark = pytest.mark.skipif(compiler() is None, reason="no host compiler")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Up, down, one axis kept, equal, single pixels, more input columns than a block has threads, and more output
# columns than a chunk of shared memory holds.
RESIZES = [
    ((4, 5), (9, 13)),
    ((9, 13), (4, 5)),
    ((5, 5), (5, 9)),
    ((6, 4), (6, 4)),
    ((1, 1), (3, 20)),
    ((9, 8), (1, 1)),
    ((2, 150), (3, 151)),
    ((2, 3), (2, 1100)),
]


def random(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def tolerance(dtype, value, *sizes):
    """One rounding of the stored type, and the rounding of positions, which grows with the size."""
    arithmetic = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    length = max(max(size) for size in sizes)
    return (torch.finfo(dtype).eps + (8 + length) * arithmetic) * value.abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("source", "size"), RESIZES)
def test_upsample(source, size, dtype):
    maps = random(2, 9, *source, dtype=dtype)  # 18 planes: more than one slice of them
    truth = F.interpolate(maps.double(), size=size, mode="bilinear", align_corners=False)
    result = upsample_masks(maps, *size)
    torch.testing.assert_close(result.double(), truth, rtol=0, atol=tolerance(dtype, truth, source, size))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("source", "size"), RESIZES)
def test_upsample_backward(source, size, dtype):
    maps = random(1, 2, *source, dtype=torch.float64).requires_grad_()
    gradient = random(1, 2, *size, dtype=dtype, seed=1)
    output = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    (truth,) = torch.autograd.grad(output, maps, gradient.double())
    result = upsample_masks_backward(gradient, *source)
    torch.testing.assert_close(result.double(), truth, rtol=0, atol=4 * tolerance(dtype, truth, source, size))


def test_the_cpu_kernel_gives_the_same_bits():
    pytest.importorskip("groupvit_fast._native")
    maps = random(2, 9, 7, 5)
    assert torch.equal(upsample_masks(maps, 33, 20), torch.ops.groupvit_fast.upsample_masks(maps, 33, 20))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 7])
@pytest.mark.parametrize(("source", "size"), RESIZES)
def test_labels(source, size, groups, dtype):
    maps, scores = random(2, groups, *source, dtype=dtype), random(2, groups, 40, dtype=dtype, seed=1)
    labels, _ = decode_masks(maps, scores, *size, None, None, 0)
    assert torch.equal(labels, reference.decode_masks(maps, scores, size))


@pytest.mark.parametrize("score_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_classes", [6, 40, 130])  # counted in shared memory; no longer; never
def test_background_and_confusion(num_classes, score_dtype):
    maps, scores = random(3, 5, 4, 6), random(3, 5, 5, dtype=score_dtype, seed=1)
    scores[0, 0, 2] = float("nan")
    scores[0, 1] = 0.9  # equal to the threshold: foreground
    threshold = torch.tensor([0.9, -9.0, 9.0], dtype=score_dtype)
    target = torch.randint(-2, num_classes + 3, (3, 37, 41), generator=torch.Generator().manual_seed(2))
    labels, confusion = decode_masks(maps, scores, 37, 41, threshold, target, num_classes)
    options = {"background_threshold": threshold, "target": target, "num_classes": num_classes}
    expected = reference.decode_masks(maps, scores, (37, 41), **options)
    assert torch.equal(labels, expected[0])
    assert torch.equal(confusion, expected[1])


def test_known_labels_and_ties():
    labels, _ = decode_masks(
        torch.ones(2, 3, 2, 2), torch.tensor([[5, 1, 2], [7, 8, 9]]), 5, 4, None, None, 0
    )
    assert labels.flatten(1).unique(dim=1).tolist() == [[5], [7]]
    tied = torch.zeros(1, 1, 70)
    tied[0, 0, [33, 65]] = 1.0  # one lane holds both, and lane 1 the first
    assert decode_masks(torch.ones(1, 1, 1, 1), tied, 1, 1, None, None, 0)[0].item() == 33
