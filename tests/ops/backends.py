"""The back ends that the operator tests run over, each with the public interface of `groupvit_fast.ops`.

reference   plain PyTorch on the CPU
cpu         the compiled CPU kernels
cuda        the CUDA kernels, where there is a GPU
host_cuda   the same CUDA sources run on the CPU (tests/host_cuda), on small cases only
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from groupvit_fast import ops
from groupvit_fast.ops import library

assign_module = importlib.import_module("groupvit_fast.ops.gumbel_assign")  # the function has the same name


@dataclass(frozen=True)
class Backend:
    name: str
    device: str = "cpu"
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    largest: int = 1 << 40  # multiplications of a case; what is larger is left out

    def active(self):
        """While active, the public operators run on this back end (host_cuda is called directly)."""
        return ops.use_backend("reference" if self.name == "reference" else "native")

    @property
    def compiled(self) -> bool:
        return self.name in ("cpu", "cuda")

    def gumbel_assign(self, query, key, value, **options) -> ops.Assignment:
        if self.name != "host_cuda":
            return ops.gumbel_assign(query, key, value, **options)
        settings = {
            "bias": None,
            "noise_key": None,
            "scale": None,
            "tau": 1.0,
            "eps": 1.0,
            "hard": True,
        } | options
        scale = query.shape[-1] ** -0.5 if settings["scale"] is None else settings["scale"]
        results = HostAssign.apply(
            query, key, None if value is key else value, settings["bias"], settings["noise_key"], scale,
            settings["tau"], settings["eps"], settings["hard"],
        )  # fmt: skip
        return ops.Assignment(*results[:3])

    def group_attention(self, query, key, value, *, scale=None) -> Tensor:
        if self.name != "host_cuda":
            return ops.group_attention(query, key, value, scale=scale)
        return HostAttention.apply(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)[0]


def host_cuda():
    import host_cuda_backend

    return host_cuda_backend


class HostAssign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        results = host_cuda().gumbel_assign_forward(*inputs)
        assign_module._save(ctx, inputs, results)
        return results

    @staticmethod
    def backward(ctx, gradient, _index, grad_count, _lse):
        query, key, value, bias, *rest = ctx.saved_tensors
        gradient = torch.zeros_like(query) if gradient is None else gradient
        gradients = host_cuda().gumbel_assign_backward(
            gradient, grad_count, query, key, value, bias, *rest, *ctx.constants
        )
        used = (True, True, value is not None, bias is not None)
        return *(g if u else None for g, u in zip(gradients, used, strict=True)), *(None,) * 5


class HostAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, scale):
        ctx.scale = scale
        output, lse = host_cuda().group_attention_forward(query, key, value, scale)
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(query, key, value, output, lse)
        return output, lse

    @staticmethod
    def backward(ctx, gradient, _):
        return *host_cuda().group_attention_backward(gradient, *ctx.saved_tensors, ctx.scale), None


def _host_cuda_available() -> bool:
    """Whether a host compiler is there, and not switched off."""
    if os.environ.get("GROUPVIT_TEST_HOST_CUDA", "1") != "1":
        return False
    return importlib.import_module("host_cuda_library").compiler() is not None


HALF = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = [Backend("reference")]
if library.HAS_CPU:
    BACKENDS.append(Backend("cpu"))
if library.HAS_CUDA:
    BACKENDS.append(Backend("cuda", device="cuda", dtypes=HALF))
if library.HAS_CPU and _host_cuda_available():
    BACKENDS.append(Backend("host_cuda", dtypes=HALF, largest=300_000))
