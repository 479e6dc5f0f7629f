"""Tensors beyond 2^31 elements, samples far apart, a second GPU: what 32-bit indices would spoil."""

from __future__ import annotations

import pytest
import torch
from far_apart import far_apart

from groupvit_fast import ops
from groupvit_fast.ops import library

NOISE = torch.tensor([3, 4])
GPUS = torch.cuda.device_count()
needs_cpu_kernels = pytest.mark.skipif(not library.HAS_CPU, reason="nothing was compiled")


def assign_results(query, key, bias, gradient):
    """Output, index, count and gradients, the tokens being keys and values at once."""
    query, key = (t.detach().requires_grad_() for t in (query, key))
    result = ops.gumbel_assign(query, key, key, bias=bias, noise_key=NOISE.to(query.device))
    return [*result, *torch.autograd.grad(result.output, (query, key), gradient)]


def attention_results(query, key, value, gradient):
    leaves = [t.detach().requires_grad_() for t in (query, key, value)]
    output = ops.group_attention(*leaves)
    return [output, *torch.autograd.grad(output, leaves, gradient)]


def mask_results(maps, scores):
    maps = maps.detach().requires_grad_()
    fine = ops.upsample_masks(maps, (9, 70))
    (gradient,) = torch.autograd.grad(fine, maps, torch.ones_like(fine))
    return [fine, gradient, ops.decode_masks(maps, scores, (9, 70))]


def problems(device="cpu"):
    """A function and its inputs for each operator."""
    assign = [torch.randn(size) for size in ((2, 9, 40), (2, 30, 40), (2, 9), (2, 9, 40))]
    attention = [torch.randn(2, 3, rows, 20) for rows in (9, 30, 30, 9)]
    masks = [torch.randn(2, 5, 4, 6), torch.randn(2, 5, 7)]
    functions = (assign_results, assign), (attention_results, attention), (mask_results, masks)
    return [(function, [t.to(device) for t in tensors]) for function, tensors in functions]


@needs_cpu_kernels
@pytest.mark.parametrize("number", range(3), ids=["gumbel_assign", "group_attention", "masks"])
def test_samples_may_lie_more_than_32_bits_apart(number):
    function, tensors = problems()[number]
    for one, other in zip(function(*tensors), function(*map(far_apart, tensors)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("number", range(3), ids=["gumbel_assign", "group_attention", "masks"])
def test_the_second_gpu_gives_the_same_bits_while_the_first_is_current(number):
    results = []
    for device in ("cuda:0", "cuda:1"):
        torch.manual_seed(0)
        function, tensors = problems(device)[number]
        with torch.cuda.device(0):
            results.append(function(*tensors))
        assert all(t.device == torch.device(device) for t in results[-1])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.cpu(), other.cpu())


def _free_gpu_memory() -> int:
    return torch.cuda.mem_get_info()[0] if GPUS else 0


@pytest.mark.skipif(_free_gpu_memory() < 40 << 30, reason="needs a GPU with 40 GiB free")
@pytest.mark.parametrize("operator", ["gumbel_assign", "group_attention"])
def test_more_than_2_to_the_31_elements(operator):
    """The last sample of a tensor too large for 32-bit indices has the bits that it has alone."""
    tokens, channels = 784, 384
    batch = 2**31 // (tokens * channels) + 2
    query = torch.randn(batch, 8, channels, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(batch, tokens, channels, device="cuda", dtype=torch.bfloat16)
    assert key.numel() > 2**31
    gradient = torch.randn_like(query)
    if operator == "gumbel_assign":

        def run(query, key, gradient):
            query, key = (t.detach().requires_grad_() for t in (query, key))
            result = ops.gumbel_assign(query, key, key)
            return [*result, *torch.autograd.grad(result.output, (query, key), gradient)]
    else:

        def run(query, key, gradient):
            return attention_results(*(t.unsqueeze(1) for t in (query, key, key, gradient)))

    for one, other in zip(run(query, key, gradient), run(query[-1:], key[-1:], gradient[-1:]), strict=True):
        assert torch.equal(one[-1:], other)


@pytest.mark.skipif(_free_gpu_memory() < 40 << 30, reason="needs a GPU with 40 GiB free")
def test_masks_of_more_than_2_to_the_31_elements():
    maps = torch.randn(1400, 8, 28, 28, device="cuda", dtype=torch.bfloat16)
    fine = ops.upsample_masks(maps, (448, 448))
    assert fine.numel() > 2**31
    assert torch.equal(fine[-1:], ops.upsample_masks(maps[-1:], (448, 448)))
    del fine
    labels = torch.arange(8, device="cuda").expand(11000, 8)
    maps = maps[:1].expand(11000, -1, -1, -1)
    decoded = ops.decode_masks(maps, labels, (448, 448))
    assert decoded.numel() > 2**31
    assert torch.equal(decoded[-1], decoded[0])


@pytest.mark.skipif(not GPUS, reason="needs a GPU")
def test_masks_in_a_cuda_graph():
    _, (maps, scores) = problems("cuda")[2]
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ops.decode_masks(maps, scores, (9, 70))
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = ops.upsample_masks(maps, (9, 70)), ops.decode_masks(maps, scores, (9, 70))
    maps.copy_(torch.randn_like(maps))
    graph.replay()
    wanted = ops.upsample_masks(maps, (9, 70)), ops.decode_masks(maps, scores, (9, 70))
    for one, other in zip(captured, wanted, strict=True):
        assert torch.equal(one, other)
