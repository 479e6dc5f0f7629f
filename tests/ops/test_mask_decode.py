"""decode_masks: labels and confusion matrix against the reference, argmax and numpy."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mask_cases import DTYPES, RESIZES, backend, native_only, random_maps  # noqa: F401

from groupvit_fast import ops
from groupvit_fast.ops import reference

# ---- decode_masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 2, 8, 64])
@pytest.mark.parametrize(("source", "size"), RESIZES)
def test_labels_are_those_of_the_reference(source, size, groups, dtype, device):
    maps = random_maps(2, groups, *source, dtype=dtype, device=device)
    scores = random_maps(2, groups, 5, dtype=dtype, device=device, seed=1)
    labels = ops.decode_masks(maps, scores, size)
    assert labels.dtype == torch.int64
    assert labels.shape == (2, *size)
    # Two sums of the same products may be rounded apart, so equality is asked for where the best two differ.
    fine = F.interpolate(maps.double(), size=size, mode="bilinear", align_corners=False)
    best = fine.topk(min(groups, 2), dim=1).values
    clear = (best[:, 0] - best[:, -1] > 1e-5) | (groups == 1)
    expected = reference.decode_masks(maps, scores, size)
    assert torch.equal(labels[clear], expected[clear])
    assert (labels == expected).float().mean().item() >= 0.9999


def test_ties_go_to_the_lowest_group_and_class(device):
    maps = torch.ones(1, 5, 3, 3, device=device)
    scores = torch.tensor([[[0.0, 2.0, 2.0]] + [[1.0, 0.0, 0.0]] * 4], device=device)
    assert torch.equal(
        ops.decode_masks(maps, scores, (7, 7)), torch.ones(1, 7, 7, dtype=torch.int64, device=device)
    )


def test_nan_and_infinity_win_and_lose_as_in_argmax(device):
    maps = torch.zeros(1, 4, 1, 3, device=device)
    maps[0, :, 0, 0] = torch.tensor([1.0, float("nan"), float("inf"), float("nan")])
    maps[0, :, 0, 1] = -float("inf")
    maps[0, :, 0, 2] = torch.tensor([-float("inf"), -float("inf"), -1.0, float("inf")])
    labels = ops.decode_masks(maps, torch.arange(4, device=device).unsqueeze(0), (1, 3))
    assert labels.flatten().tolist()[0] == 1
    assert torch.equal(labels, F.interpolate(maps, size=(1, 3), mode="bilinear").argmax(dim=1))
    scores = torch.tensor([[[0.0, float("nan"), 9.0, float("nan")]]], device=device)
    assert ops.decode_masks(torch.ones(1, 1, 2, 2, device=device), scores, (2, 2)).unique().tolist() == [1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["number", "one for all", "one an image"])
def test_background_threshold(form, dtype, device):
    maps = random_maps(3, 6, 5, 7, dtype=dtype, device=device)
    scores = random_maps(3, 6, 4, dtype=dtype, device=device, seed=1)
    scores[0, 0] = float("nan")
    median = scores[1:].max(dim=-1).values.float().median().item()
    threshold = {
        "number": median,
        "one for all": torch.tensor(median, device=device),
        "one an image": torch.tensor([median, -9.0, 9.0], device=device),
    }[form]
    labels = ops.decode_masks(maps, scores, (33, 20), background_threshold=threshold)
    assert torch.equal(labels, reference.decode_masks(maps, scores, (33, 20), background_threshold=threshold))
    if form == "one an image":
        assert labels[1].min() > 0
        assert labels[2].max() == 0


def test_a_score_equal_to_the_threshold_is_foreground(device):
    maps, scores = torch.ones(1, 1, 2, 2, device=device), torch.tensor([[[0.25, 0.5]]], device=device)
    assert ops.decode_masks(maps, scores, (2, 2), background_threshold=0.5).unique().tolist() == [2]
    assert ops.decode_masks(maps, scores, (2, 2), background_threshold=0.5000001).unique().tolist() == [0]


@pytest.mark.parametrize("num_classes", [4, 7, 120, 300])
def test_confusion_matrix_counts_what_numpy_counts(num_classes, device):
    maps, size = random_maps(3, 6, 5, 7, device=device), (40, 31)
    scores = random_maps(3, 6, 4, device=device, seed=1)
    generator = torch.Generator().manual_seed(2)
    target = torch.randint(-1, num_classes + 2, (3, *size), generator=generator).to(device)
    target[0, :5] = 255 if num_classes < 255 else -100
    labels, confusion = ops.decode_masks(maps, scores, size, target=target, num_classes=num_classes)
    assert torch.equal(labels, ops.decode_masks(maps, scores, size))
    truth, seen = target.cpu().numpy().ravel(), labels.cpu().numpy().ravel()
    kept = (truth >= 0) & (truth < num_classes)
    expected = np.bincount(truth[kept] * num_classes + seen[kept], minlength=num_classes**2)
    assert confusion.dtype == torch.int64
    np.testing.assert_array_equal(confusion.cpu().numpy(), expected.reshape(num_classes, num_classes))


def test_confusion_matrix_size_and_labels_outside_it(device):
    maps, scores = random_maps(1, 3, 2, 2, device=device), random_maps(1, 3, 4, device=device, seed=1)
    target = torch.zeros(1, 4, 4, dtype=torch.uint8, device=device)
    assert ops.decode_masks(maps, scores, (4, 4), target=target)[1].shape == (4, 4)
    with_background = ops.decode_masks(maps, scores, (4, 4), target=target, background_threshold=0.0)
    assert with_background[1].shape == (5, 5)
    labels = torch.tensor([[7, -1, 3]], device=device)
    _, confusion = ops.decode_masks(maps, labels, (4, 4), target=target, num_classes=2)
    assert confusion.sum() == 0


@pytest.mark.parametrize("options", [{}, {"num_classes": 3}])
def test_decode_of_nothing(options, device):
    maps, scores = torch.zeros(0, 2, 3, 3, device=device), torch.zeros(0, 2, 3, device=device)
    assert ops.decode_masks(maps, scores, (5, 4)).shape == (0, 5, 4)
    target = torch.zeros(0, 5, 4, dtype=torch.int64, device=device)
    assert ops.decode_masks(maps, scores, (5, 4), target=target, **options)[1].sum() == 0


def test_decode_carries_no_gradient_and_takes_inputs_that_do(device):
    maps = random_maps(1, 3, 2, 2, device=device).requires_grad_()
    scores = random_maps(1, 3, 4, device=device, seed=1).requires_grad_()
    assert not ops.decode_masks(maps, scores, (4, 4)).requires_grad


MEMORY_PROBE = """
import resource, torch
from groupvit_fast import ops
maps, labels = torch.randn(1, 64, 28, 28), torch.arange(64).view(1, 64)
ops.decode_masks(maps, labels, (64, 64))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops.decode_masks(maps, labels, (2048, 2048))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@native_only
def test_decode_holds_nothing_of_the_size_of_all_maps():
    command = [sys.executable, "-c", MEMORY_PROBE]
    kilobytes = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    labels_bytes, maps_bytes = 8 * 2048**2, 4 * 64 * 2048**2
    assert kilobytes * 1024 < 2.5 * labels_bytes < maps_bytes / 10


# ---- bad input -------------------------------------------------------------------------------------------

MAPS, SCORES = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 6)
LABELS, TARGET = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 8, 8, dtype=torch.int64)
BAD_DECODE = [
    ((MAPS[:, :0], SCORES[:, :0], (8, 8)), {}, "maps must have G >= 1"),
    ((MAPS, SCORES[:, :2], (8, 8)), {}, r"scores must be \[2, 3, K\].*got shape \[2, 2, 6\]"),
    ((MAPS, SCORES[:1], (8, 8)), {}, r"scores must be \[2, 3, K\]"),
    ((MAPS, SCORES[..., :0], (8, 8)), {}, "K >= 1"),
    ((MAPS, SCORES[..., 0], (8, 8)), {}, r"floating \[B, G, K\] or int64 \[B, G\], got torch.float32"),
    ((MAPS, SCORES.long(), (8, 8)), {}, r"floating \[B, G, K\] or int64 \[B, G\], got torch.int64"),
    ((MAPS, None, (8, 8)), {}, "scores must be a tensor, got NoneType"),
    ((MAPS, LABELS, (8, 8)), {"background_threshold": 0.5}, "background_threshold needs scores"),
    ((MAPS, SCORES, (8, 8)), {"background_threshold": torch.zeros(3)}, r"a number or \[2\].*got shape \[3\]"),
    (
        (MAPS, SCORES, (8, 8)),
        {"target": TARGET[:1]},
        r"target must be integers \[2, 8, 8\], got .*\[1, 8, 8\]",
    ),
    ((MAPS, SCORES, (8, 8)), {"target": TARGET.float()}, "target must be integers"),
    ((MAPS, LABELS, (8, 8)), {"target": TARGET}, "num_classes must be given"),
    ((MAPS, SCORES, (8, 8)), {"target": TARGET, "num_classes": 0}, "num_classes must be positive, got 0"),
]


@pytest.mark.parametrize(("arguments", "options", "message"), BAD_DECODE)
def test_bad_decode_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ops.decode_masks(*arguments, **options)
