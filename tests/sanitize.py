"""The CUDA operators under compute-sanitizer: memcheck, racecheck, initcheck, synccheck (`make sanitize`).

    python tests/sanitize.py                  # on a machine with a GPU; some minutes
    python tests/sanitize.py --tool racecheck --calls 40
    python tests/sanitize.py --cases cpu      # only call the operators, without the sanitizer

A small set of cases, one for each path through the kernels, forward and backward. PyTorch's caching of memory
is off, so that an access past a tensor is an access past an allocation.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch

from groupvit_fast import ops

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# B, S, L, C: both official stages, several tiles of everything, odd rows.
ASSIGN_SHAPES = [(2, 64, 196, 384), (2, 8, 64, 384), (1, 66, 130, 450), (2, 7, 13, 9)]
# B, H, S, L, D: the same, and a head too wide to keep its queries in shared memory.
ATTENTION_SHAPES = [(2, 6, 64, 196, 64), (2, 6, 8, 64, 64), (1, 1, 66, 70, 20), (1, 1, 5, 70, 264)]
MASK_SIZES = [((14, 14), (224, 224)), ((9, 13), (4, 5)), ((2, 3), (2, 1100))]


def _random(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(dtype).requires_grad_()


def all_calls(device: str) -> list[Callable[[], None]]:
    """Every operator, forward and backward, on every case."""
    assign = itertools.product(ASSIGN_SHAPES, DTYPES, (True, False), (True, False))
    calls = [partial(_assign, device, *case) for case in assign]
    calls += [partial(_attend, device, *case) for case in itertools.product(ATTENTION_SHAPES, DTYPES)]
    calls += [partial(_masks, device, *case) for case in itertools.product(MASK_SIZES, DTYPES)]
    return calls


def _assign(device: str, shape: tuple[int, ...], dtype: torch.dtype, hard: bool, shared: bool) -> None:
    batch, groups, tokens, channels = shape
    query = _random(batch, groups, channels, dtype=dtype, device=device)
    key = _random(batch, tokens, channels, dtype=dtype, device=device)
    value = key if shared else _random(batch, tokens, channels, dtype=dtype, device=device)
    bias = _random(batch, groups, dtype=dtype, device=device)
    noise_key = torch.tensor([1234, 5678], device=device)
    result = ops.gumbel_assign(query, key, value, bias=bias, hard=hard, noise_key=noise_key)
    result.output.sum().backward()


def _attend(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, heads, groups, tokens, depth = shape
    rows = (groups, tokens, tokens)
    inputs = [_random(batch, heads, n, depth, dtype=dtype, device=device) for n in rows]
    ops.group_attention(*inputs).sum().backward()


def _masks(device: str, sizes: tuple[tuple[int, int], tuple[int, int]], dtype: torch.dtype) -> None:
    source, size = sizes
    maps = _random(2, 8, *source, dtype=dtype, device=device)
    ops.upsample_masks(maps, size).sum().backward()
    target = torch.randint(0, 21, (2, *size), device=device)
    scores = torch.randn(2, 8, 20, device=device)
    ops.decode_masks(maps, scores, size, background_threshold=0.5, target=target, num_classes=21)


def run_cases(device: str, most: int | None = None) -> int:
    """Make all calls, or `most` of them, evenly from all; returns their number."""
    torch.manual_seed(0)
    calls = all_calls(device)
    if most is not None and most < len(calls):
        calls = [calls[number * len(calls) // most] for number in range(most)]
    for call in calls:
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return len(calls)


def sanitize(tool: str, most: int | None) -> int:
    """Run the cases under one tool; returns its exit status, 0 when nothing was found."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
    if tool == "memcheck":
        command += ["--leak-check", "no"]
    command += [sys.executable, __file__, "--cases", "cuda"]
    command += ["--calls", str(most)] if most is not None else []
    print(f"--- {tool}", flush=True)
    return subprocess.run(command, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}).returncode


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tool", choices=TOOLS, help="only this one")
    parser.add_argument(
        "--cases", choices=("cpu", "cuda"), help="call the operators there, without the sanitizer"
    )
    parser.add_argument("--calls", metavar="N", type=int, help="only N of the cases, evenly from all")
    options = parser.parse_args()
    if options.cases:
        print(f"{run_cases(options.cases, options.calls)} calls, forward and backward, on {options.cases}")
        return
    if not torch.cuda.is_available():
        sys.exit(
            "no GPU here: compute-sanitizer runs the CUDA kernels; tests/host_cuda checks them without one"
        )
    if shutil.which("compute-sanitizer") is None:
        sys.exit(
            "compute-sanitizer is not on the path; it comes with the CUDA toolkit (bin/compute-sanitizer)"
        )
    failed = [
        tool for tool in ([options.tool] if options.tool else TOOLS) if sanitize(tool, options.calls) != 0
    ]
    if failed:
        sys.exit(f"found by {', '.join(failed)}: see above")
    print("nothing found")


if __name__ == "__main__":
    main()
