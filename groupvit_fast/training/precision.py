"""Which number type a run computes in: what `--amp` means on this machine."""

from __future__ import annotations

import contextlib
import functools
import time

import torch
from torch import nn

from groupvit_fast.console import UserError
from groupvit_fast.ops.library import cpu_flags

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}
WORTHWHILE = 1.2
"""bf16 is used on a CPU only if it is measured faster by at least this factor."""
WIDE = 256
"""Channels from which AVX512-BF16 is tried."""
MEASURING_SECONDS = 0.15


def choose_dtype(amp: bool, amp_dtype: str, device: str, width: int) -> tuple[str, str | None]:
    """The type to compute in ("bf16", "fp16" or "float32"), and a line for the user if it needs explaining.

    `width` is the channel count of the model: whether bf16 pays on a CPU depends on it.
    """
    if not amp or amp_dtype == "float32":
        return "float32", None
    if amp_dtype == "fp16" and device != "cuda":
        raise UserError("--amp-dtype fp16 needs a GPU; use bf16 or float32 on a CPU")
    if amp_dtype != "auto":
        return amp_dtype, None
    if device == "cuda":
        return ("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"), None
    if not cpu_has_fast_bf16(width):
        why = "this CPU has no fast bf16 for a model this wide"
    elif (speedup := cpu_bf16_speedup(width)) < WORTHWHILE:
        why = f"bf16 was measured at {speedup:.1f}x its speed on this CPU"
    else:
        return "bf16", None
    return "float32", f"--amp: computing in float32, {why} (--amp-dtype bf16 insists)"


def cpu_has_fast_bf16(width: int) -> bool:
    """Whether the CPU multiplies bf16 in hardware: AMX on x86, BFMMLA on Arm, or AVX512-BF16.

    The last only for models at least `WIDE`: how much of a step it speeds up depends on the processor (it ran
    a layer at 0.6 to 0.9 times the speed of float32 on one, a step of the official model 1.7 times as fast
    on another), and what it does to the results of narrow models has not been measured.
    """
    flags = cpu_flags()
    return not flags.isdisjoint({"amx_bf16", "bf16"}) or (width >= WIDE and "avx512_bf16" in flags)


@functools.cache
def cpu_bf16_speedup(width: int) -> float:
    """Time of float32 over time of bf16 autocast for one transformer MLP, forward and backward, on this CPU.

    A layer and not a bare product, because at small widths the casts cost more than the products save. The
    two take turns and the best of each counts, so that a busy machine decides less.
    """
    with torch.random.fork_rng(devices=[]):
        layer = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        x = torch.randn(2**16 // width, width)
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    begin = time.perf_counter()
    rounds = 0
    while rounds < 3 or (rounds < 20 and time.perf_counter() - begin < MEASURING_SECONDS):
        rounds += 1
        for dtype in best:
            start = time.perf_counter()
            with autocast("cpu", dtype):
                y = layer(x)
            y.float().square().mean().backward()
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.float32] / best[torch.bfloat16]


def autocast(device: str, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Autocast to `dtype`; float32 means no autocast at all."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device, dtype)
