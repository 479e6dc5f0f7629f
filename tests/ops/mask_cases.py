"""What the tests of the mask operators share: sizes, types, back ends, random maps."""

from __future__ import annotations

import pytest
import torch

from groupvit_fast.ops import library

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# h, w -> H, W: up, down, both at once, one axis kept, equal, single pixels, odd, more than one strip.
RESIZES = [
    ((14, 14), (224, 224)),
    ((28, 37), (75, 100)),
    ((7, 5), (13, 29)),
    ((30, 20), (7, 9)),
    ((3, 40), (50, 11)),
    ((5, 5), (5, 9)),
    ((6, 4), (6, 4)),
    ((1, 1), (3, 70)),
    ((9, 8), (1, 1)),
    ((1, 7), (2, 129)),
]
NATIVE = pytest.param("native", marks=pytest.mark.skipif(not library.HAS_CPU, reason="nothing was compiled"))


@pytest.fixture(params=["reference", NATIVE], autouse=True)
def backend(request):
    with library.use_backend(request.param):
        yield request.param


native_only = pytest.mark.parametrize("backend", [NATIVE], indirect=True)


def random_maps(*shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)
