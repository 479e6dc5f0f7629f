"""Launches and bytes of the CUDA kernels, from the run of their sources on the host."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from groupvit_fast.ops import library

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "host_cuda"))

import host_cuda_backend as host
import host_cuda_library
import host_cuda_masks as masks


def conditions() -> dict[str, str] | str:
    """What the counts hold for, or why they cannot be had here."""
    compiler = host_cuda_library.compiler()
    if compiler is None or not library.HAS_CPU:
        return "no host compiler"
    shown = subprocess.run([compiler, "-dumpfullversion"], capture_output=True, text=True)
    return {"compiler": f"{Path(shutil.which(compiler) or compiler).name} {shown.stdout.strip()}"}


def calls() -> dict[str, Callable[[], object]]:
    """Each operator in bf16 at a small shape, forward and backward."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    query, key, noise_key = random(1, 16, 64), random(1, 70, 64), torch.tensor([7, 1])
    options = (None, None, noise_key, 0.125, 1.0, 1.0, True)
    heads = [random(1, 2, rows, 32) for rows in (16, 70, 70)]
    maps, scores = random(1, 8, 7, 7), random(1, 8, 5)
    assigned = host.gumbel_assign_forward(query, key, *options)
    attended = host.group_attention_forward(*heads, 0.25)
    back = (query, None, query, key, *options[:3], *assigned, *options[3:])
    return {
        "gumbel_assign forward": lambda: host.gumbel_assign_forward(query, key, *options),
        "gumbel_assign backward": lambda: host.gumbel_assign_backward(*back),
        "group_attention forward": lambda: host.group_attention_forward(*heads, 0.25),
        "group_attention backward": lambda: host.group_attention_backward(heads[0], *heads, *attended, 0.25),
        "upsample_masks forward": lambda: masks.upsample_masks(maps, 28, 28),
        "upsample_masks backward": lambda: masks.upsample_masks_backward(random(1, 8, 28, 28), 7, 7),
        "decode_masks": lambda: masks.decode_masks(maps, scores, 28, 28, None, None, 0),
    }


def measure() -> dict[str, int]:
    """Launches, bytes read and bytes written of every call."""
    made = calls()
    found = {}
    for name, call in made.items():
        host_cuda_library.library().traffic()
        call()
        counted = zip(
            ("launches", "bytes read", "bytes written"), host_cuda_library.library().traffic(), strict=True
        )
        found |= {f"{name}, {what}": number for what, number in counted}
    return found
