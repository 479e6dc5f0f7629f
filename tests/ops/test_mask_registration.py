"""The mask operators as PyTorch sees them: opcheck, compile, vmap, checkpointing, checks of a direct call."""

from __future__ import annotations

import pytest
import torch
from mask_cases import backend, native_only, random_maps  # noqa: F401

from groupvit_fast import ops


@native_only
def test_opcheck(device):
    namespace = torch.ops.groupvit_fast
    maps = random_maps(2, 3, 4, 5, device=device)
    leaf = maps.clone().requires_grad_()
    for operator in (namespace.upsample_masks, namespace.upsample_masks_backward):
        torch.library.opcheck(operator, (leaf, 9, 3))
        torch.library.opcheck(operator, (maps[:0], 9, 3))
        torch.library.opcheck(operator, (leaf.transpose(2, 3), 5, 5))
    scores, labels = random_maps(2, 3, 4, device=device), torch.arange(6, device=device).view(2, 3)
    target = torch.zeros(2, 9, 3, dtype=torch.int64, device=device)
    threshold = torch.zeros(2, device=device)
    torch.library.opcheck(namespace.decode_masks, (maps, scores, 9, 3, None, None, 0))
    torch.library.opcheck(namespace.decode_masks, (maps, labels, 9, 3, None, target, 6))
    torch.library.opcheck(namespace.decode_masks, (maps, scores, 9, 3, threshold, target, 5))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic, device):
    def step(maps, scores, target):
        fine = ops.upsample_masks(maps, (maps.shape[2] * 3, 20))
        labels, confusion = ops.decode_masks(
            maps, scores, target.shape[1:], background_threshold=0.1, target=target
        )
        return fine.square().sum(), labels, confusion

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for height in (4, 5):
        maps = random_maps(2, 3, height, 6, device=device).requires_grad_()
        scores = random_maps(2, 3, 4, device=device, seed=1)
        target = torch.ones(2, 11, 13, dtype=torch.int64, device=device)
        expected, result = step(maps, scores, target), compiled(maps, scores, target)
        for ours, plain in zip(result, expected, strict=True):
            torch.testing.assert_close(ours, plain)
        gradients = [torch.autograd.grad(values[0], maps)[0] for values in (result, expected)]
        torch.testing.assert_close(*gradients)


def test_upsample_under_vmap_and_checkpoint(device):
    maps = random_maps(3, 2, 4, 5, 6, device=device)
    mapped = torch.vmap(lambda m: ops.upsample_masks(m, (9, 7)))(maps)
    assert torch.equal(mapped, torch.stack([ops.upsample_masks(m, (9, 7)) for m in maps]))
    leaf = maps[0].requires_grad_()
    result = torch.utils.checkpoint.checkpoint(ops.upsample_masks, leaf, (9, 7), use_reentrant=False)
    (gradient,) = torch.autograd.grad(result.square().sum(), leaf)
    (plain,) = torch.autograd.grad(ops.upsample_masks(leaf, (9, 7)).square().sum(), leaf)
    assert torch.equal(gradient, plain)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_decode_under_vmap(device):
    maps, scores = random_maps(3, 2, 4, 5, 6, device=device), random_maps(3, 2, 4, 7, device=device)
    mapped = torch.vmap(lambda m, s: ops.decode_masks(m, s, (9, 7)))(maps, scores)
    pairs = zip(maps, scores, strict=True)
    assert torch.equal(mapped, torch.stack([ops.decode_masks(m, s, (9, 7)) for m, s in pairs]))


MAPS, SCORES = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 6)
LABELS, TARGET = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 8, 8, dtype=torch.int64)


@pytest.mark.parametrize(
    ("operator", "arguments", "message"),
    [
        ("upsample_masks", (MAPS[0], 8, 8), r"maps must be \[B, G, h, w\]"),
        ("upsample_masks", (MAPS.int(), 8, 8), "maps must be float32"),
        ("upsample_masks", (MAPS, 0, 8), "size must be two positive numbers"),
        ("upsample_masks", (MAPS, 2**16, 2**16), r"size must be below 2\^31 pixels"),
        ("upsample_masks_backward", (MAPS[..., :0], 8, 8), "gradient must have h, w >= 1"),
        ("decode_masks", (MAPS, SCORES[:1], 8, 8, None, None, 0), r"scores must be \[B, G, K\]"),
        ("decode_masks", (MAPS, SCORES.int(), 8, 8, None, None, 0), "scores must be float32"),
        ("decode_masks", (MAPS, LABELS.int(), 8, 8, None, None, 0), "labels must be int64"),
        ("decode_masks", (MAPS, LABELS, 8, 8, torch.zeros(2), None, 0), "background_threshold needs scores"),
        (
            "decode_masks",
            (MAPS, SCORES, 8, 8, torch.zeros(2).double(), None, 0),
            "background_threshold must have",
        ),
        ("decode_masks", (MAPS, SCORES, 8, 8, None, TARGET[:, :4], 6), r"target must be \[B, H, W\]"),
        ("decode_masks", (MAPS, SCORES, 8, 8, None, TARGET.int(), 6), "target must be int64"),
        ("decode_masks", (MAPS, SCORES, 8, 8, None, TARGET, 0), "num_classes must be positive"),
    ],
)
@native_only
def test_the_bare_operators_check_too(operator, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.groupvit_fast, operator)(*arguments)
