"""Every back end of PyTorch's scaled dot product attention that takes the tensors of a case."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# Beside what PyTorch picks by itself, which on a CPU is its flash kernel.
NAMED = {
    "cpu": {"math": SDPBackend.MATH},
    "cuda": {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    },
}


def candidates(leaves: Sequence[Tensor]) -> dict[str, Callable[[], Tensor]]:
    """Under "SDPA" PyTorch's own choice, under "SDPA NAME" each back end; one that refuses is left out."""
    found = {"SDPA": lambda: F.scaled_dot_product_attention(*leaves)}
    for name, backend in NAMED[leaves[0].device.type].items():
        call = _with(backend, leaves)
        if _works(call, leaves):
            found[f"SDPA {name}"] = call
    return found


def _with(backend: SDPBackend, leaves: Sequence[Tensor]) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*leaves)

    return call


def _works(call: Callable[[], Tensor], leaves: Sequence[Tensor]) -> bool:
    """Forward and backward; a back end says no by an error, and why by a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.autograd.grad(call().sum(), leaves)
        except RuntimeError:
            return False
    return True
