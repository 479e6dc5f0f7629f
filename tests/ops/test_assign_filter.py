"""The hard choice that bfloat16 narrows down: the results of the plain float32 kernel, to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from groupvit_fast import ops
from groupvit_fast.ops import library

ROOT = Path(__file__).resolve().parents[2]
# B, S, L, C: the official first stage, several tiles of tokens, odd numbers, few groups and few channels.
SHAPES = [
    (3, 64, 196, 384),
    (2, 64, 785, 96),
    (3, 65, 40, 33),
    (1, 128, 97, 48),
    (2, 40, 300, 16),
    (2, 32, 32, 700),
]


def problems():
    """(query, key, bias, options): random, nearly tied, huge, tiny, denormal and not finite."""
    for batch, groups, tokens, channels in SHAPES:
        query, key = torch.randn(batch, groups, channels), torch.randn(batch, tokens, channels)
        for scale in (0.01, 1.0, 30.0, -1.0):
            yield query, key, torch.randn(batch, groups), {"scale": scale * channels**-0.5, "tau": 0.7}
        yield query[:, :1] * (1 + 1e-7 * torch.randn(batch, groups, 1)), key, None, {}
        twins = query.clone()
        twins[:, 1::2] = twins[:, ::2][:, : groups // 2]
        twins[:, 1::2, 0] = twins[:, 1::2, 0].nextafter(torch.tensor(torch.inf))
        yield twins, key, None, {}
        for large in (1e18, 3e38):
            yield query * large, key, None, {}
        yield query * 1e-20, key * 1e-20, None, {}
        yield query * 1e-40, key, None, {"scale": 1e38}
        bad = key.clone()
        bad[0, 5, 3], bad[-1, 7, 2] = torch.nan, torch.inf
        yield query, bad, None, {}
        masked = torch.zeros(batch, groups)
        masked[:, ::2] = -torch.inf
        yield query, key, masked, {}
        bad = query.clone()
        bad[-1, 4, 1] = torch.inf
        yield bad, key, None, {}


def all_results():
    torch.manual_seed(0)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        for *tensors, options in problems():
            query, key, bias = (None if t is None else t.to(dtype) for t in tensors)
            for noise_key in (torch.tensor([3, 4]), None):
                assigned = ops.gumbel_assign(query, key, key, bias=bias, noise_key=noise_key, **options)
                results.append(tuple(assigned))
    return results


@pytest.mark.skipif(not library.HAS_CPU, reason="nothing was compiled")
@pytest.mark.skipif("avx512_bf16" not in library.cpu_flags(), reason="no products of bfloat16")
@pytest.mark.skipif("GROUPVIT_CPU" in os.environ, reason="the level is lowered")
def test_the_filter_changes_nothing(tmp_path):
    path = tmp_path / "plain.pt"
    environment = os.environ | {"GROUPVIT_CPU": "avx512", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, __file__, path], env=environment, check=True, timeout=200)
    plain = torch.load(path)
    for number, (own, wanted) in enumerate(zip(all_results(), plain, strict=True)):
        for one, other in zip(own, wanted, strict=True):
            torch.testing.assert_close(
                one, other, rtol=0, atol=0, equal_nan=True, msg=lambda text, n=number: f"problem {n}: {text}"
            )


if __name__ == "__main__":
    torch.save(all_results(), sys.argv[1])
