"""The large matrix: sizes, types, layouts, values and modes of the operators, every pair of them somewhere.

On a GPU all of it runs, which with the other operator tests makes more than 2,000 cases. Elsewhere some of it
runs, and all of it on the CPU kernels with `-m slow`.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from assign_problem import check_tensors, inputs
from attention_problem import check_tensors as check_attention
from attention_problem import heads_last, part_of_one_projection, transposed
from attention_problem import inputs as attention_inputs
from backends import BACKENDS, HALF
from mask_cases import random_maps
from pairwise import cover

from groupvit_fast import ops
from groupvit_fast.ops import reference

GROUPS = (1, 2, 7, 8, 9, 31, 63, 64, 65, 128)
TOKENS = (1, 3, 63, 64, 65, 97, 195, 196, 197, 256, 784, 785, 1024)
LARGEST = 1 << 26  # multiplications of one product; what is larger takes a smaller batch or fewer channels
OTHERS = 6  # cases of an operator on back ends other than cuda, by default


def plain(tensor):
    return tensor


def slice_of_wide(tensor):
    """Every row with others before and behind it, as in a fused key and value projection."""
    wide = torch.full(
        (*tensor.shape[:-1], 3, tensor.shape[-1]), 7.0, dtype=tensor.dtype, device=tensor.device
    )
    wide[..., 1, :] = tensor
    return wide[..., 1, :]


def offset(tensor):
    """Starts one element into its storage, so no vector of it is aligned."""
    memory = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    memory[1:] = tensor.flatten()
    return memory[1:].view(tensor.shape)


def one_for_all(tensor):
    """The first sample's, with stride 0."""
    return tensor[:1].expand_as(tensor)


ASSIGN = cover(
    {
        "batch": (1, 2, 3, 7), "groups": GROUPS, "tokens": TOKENS, "channels": (384, 96, 192, 512, 33),
        "layout": (plain, transposed, slice_of_wide, offset, one_for_all),
        "values": ("normal", "large", "one wins"), "tau": (0.1, 1.0, 5.0), "noise": (True, False),
        "bias": (True, False), "shared": (True, False),
    }
)  # fmt: skip
ATTENTION_AXES = {
    "batch": (1, 2, 3, 7), "heads": (1, 3, 6), "groups": GROUPS, "tokens": TOKENS, "depth": (32, 64, 80, 59),
    "layout": (plain, heads_last, part_of_one_projection, transposed, offset), "spread": (1.0, 100.0),
}  # fmt: skip
ATTENTION = cover(ATTENTION_AXES) + cover(ATTENTION_AXES, seed=1)
DECODE = cover(
    {
        "batch": (1, 2, 6), "groups": (1, 2, 8, 64),
        "grid": ((14, 14), (28, 28), (28, 37), (28, 42), (1, 1), (7, 5)),
        "size": ((224, 224), (448, 448), (375, 500), (1, 1), (7, 5), (683, 444)),
        "classes": (1, 2, 4, 5, 6, 21, 59, 81, 171), "background": (True, False),
    }
)  # fmt: skip


def chosen(cases, modes):
    """(back end, case, mode): all of them on a GPU, some elsewhere, the rest of the CPU's marked slow."""
    found = []
    every = [(case, mode) for case in cases for mode in modes]
    for backend in BACKENDS:
        step = 1 if backend.name == "cuda" else max(1, len(every) // OTHERS)
        for number, (case, mode) in enumerate(every):
            rest = number % step != 0
            if not rest or backend.name == "cpu":
                marks = [pytest.mark.slow] if rest else []
                found.append(pytest.param(backend, case, mode, id=f"{backend.name}-{number}", marks=marks))
    return found


def bounded(case, product):
    """The case with the batch, then the channels reduced until a product of it is not too large."""
    case = dict(case)
    while product(case) > LARGEST and case["batch"] > 1:
        case["batch"] -= 1
    return case


def keep_apart(query, key, bias, noise_key, scale):
    """Draw tokens again whose two best groups are so close that rounding decides between them."""
    for _ in range(20):
        z = reference.assignment_logits(
            *(None if t is None else t.cpu().double() for t in (query, key, bias)), scale
        )
        if noise_key is not None:
            z = z + reference.gumbel_noise(noise_key.cpu(), z.shape)
        if z.shape[1] == 1:
            return
        close = z.topk(2, dim=1).values.diff(dim=1).abs()[:, 0] < 1e-5 * (1 + z.abs().amax(dim=1))
        if not close.any():
            return
        key[close.to(key.device)] = torch.randn(int(close.sum()), key.shape[-1]).to(key)
    pytest.fail("no tokens were found whose best groups are apart")


@pytest.mark.parametrize(
    ("backend", "case", "mode"), chosen(ASSIGN, [(d, hard) for d in HALF for hard in (True, False)])
)
def test_gumbel_assign(backend, case, mode):
    dtype, hard = mode
    case = bounded(case, lambda c: c["batch"] * c["groups"] * c["tokens"] * c["channels"])
    shape = tuple(case[name] for name in ("batch", "groups", "tokens", "channels"))
    if math.prod(shape) > backend.largest:
        pytest.skip("too large to run on the host")
    spread = 100.0 if case["values"] == "large" else 2.0
    given = {"dtype": dtype, "device": backend.device, "shared": case["shared"], "bias": case["bias"]}
    query, key, value, bias, gradient = inputs(shape, spread=spread, **given)
    noise_key = torch.tensor([11, 12], device=backend.device) if case["noise"] else None
    if case["values"] == "one wins":
        query[:, 1:] *= 0.01
        key += query[:, :1] / 4
    query = case["layout"](query)
    keep_apart(query, key, bias, noise_key, shape[3] ** -0.5)
    layout = plain if case["layout"] is one_for_all else case["layout"]
    key, value = layout(key), None if value is None else layout(value)
    with backend.active():
        options = {"tau": case["tau"], "hard": hard, "noise_key": noise_key}
        check_tensors(backend, (query, key, value, bias, gradient), options)


@pytest.mark.parametrize(("backend", "case", "mode"), chosen(ATTENTION, HALF))
def test_group_attention(backend, case, mode):
    names = ("batch", "heads", "groups", "tokens", "depth")
    case = bounded(case, lambda c: math.prod(c[name] for name in names))
    shape = tuple(case[name] for name in names)
    if math.prod(shape) > backend.largest:
        pytest.skip("too large to run on the host")
    *tensors, gradient = attention_inputs(shape, dtype=mode, device=backend.device, spread=case["spread"])
    with backend.active():
        check_attention(backend, [*(case["layout"](t) for t in tensors), gradient])


@pytest.mark.parametrize(
    ("backend", "case", "mode"), [p for p in chosen(DECODE, HALF) if p.values[0].name != "host_cuda"]
)
def test_decode_masks(backend, case, mode):
    maps = random_maps(case["batch"], case["groups"], *case["grid"], dtype=mode, device=backend.device)
    scores = random_maps(case["batch"], case["groups"], case["classes"], device=backend.device, seed=1)
    threshold = scores.amax(dim=-1).median().item() if case["background"] else None
    size, classes = case["size"], case["classes"] + case["background"]
    target = torch.randint(0, classes, (case["batch"], *size), device=backend.device)
    options = {"background_threshold": threshold}
    with backend.active():
        labels, matrix = ops.decode_masks(maps, scores, size, **options, target=target, num_classes=classes)
        assert torch.equal(ops.decode_masks(maps, scores, size, **options), labels)
    wanted = reference.decode_masks(maps, scores, size, **options)
    clear = apart(maps, size)
    assert torch.equal(labels[clear], wanted[clear])
    assert (labels == wanted).double().mean() >= (0.9999 if mode == torch.float32 else 0.99)
    counted = torch.zeros(classes, classes, dtype=torch.int64, device=labels.device)
    pairs = (target.flatten(), labels.flatten())
    counted.index_put_(pairs, torch.ones_like(labels.flatten()), accumulate=True)
    assert torch.equal(matrix, counted)


def apart(maps, size):
    """Pixels at which the best two groups differ by more than the rounding of a resize."""
    fine = torch.nn.functional.interpolate(maps.double(), size=size, mode="bilinear", align_corners=False)
    best = fine.topk(min(fine.shape[1], 2), dim=1).values
    return (best[:, 0] - best[:, -1] > 1e-5) | (fine.shape[1] == 1)


# ---- the matrix itself -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cases", [ASSIGN, ATTENTION, DECODE], ids=["assign", "attention", "decode"])
def test_every_pair_of_values_meets(cases):
    axes = list(cases[0])
    for number, one in enumerate(axes):
        for other in axes[number + 1 :]:
            values = {(case[one], case[other]) for case in cases}
            wanted = len({case[one] for case in cases}) * len({case[other] for case in cases})
            assert len(values) == wanted, (one, other)


COLLECT = """
import sys, torch, pytest
torch.cuda.is_available = lambda: True
from groupvit_fast.ops import library
library.HAS_CUDA = True
arguments = ["--collect-only", "-q", "-p", "no:cacheprovider", "tests/ops", "-k", "cuda and not host_cuda"]
sys.exit(pytest.main(arguments))
"""


def test_a_gpu_gets_two_thousand_cases():
    """Collected as on a machine with a GPU, by the words that gpu_report.sh uses."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COLLECT],
        cwd=root,
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    names = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(names) >= 2000
    assert not [name for name in names if re.search(r"\bhost_cuda", name)]
