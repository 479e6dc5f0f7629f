"""NVIDIA apex, where it is installed: its fused optimisers and layer norm.

The package called `apex` on PyPI is another project, so what counts is that `apex.optimizers` is there.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from groupvit_fast.console import UserError

HOW = (
    "build it from https://github.com/NVIDIA/apex (pip install -v --no-build-isolation . with APEX_CPP_EXT=1 "
    "and APEX_CUDA_EXT=1 set), or use --optimizer adamw"
)
NAMES = {"apex-adam": "FusedAdam", "apex-lamb": "FusedLAMB"}


def apex_module(name: str, flag: str) -> ModuleType:
    """`apex.<name>` of NVIDIA's apex; a UserError that tells it from the other apex, or from none."""
    try:
        return importlib.import_module(f"apex.{name}")
    except ImportError as error:
        if importlib.util.find_spec("apex") is None:
            raise UserError(f"{flag} needs NVIDIA apex, which is not installed: {HOW}") from None
        if error.name in (None, "apex.optimizers", "apex.normalization"):
            raise UserError(
                f"{flag} needs NVIDIA apex, but the apex installed here is another project: "
                f"pip uninstall apex, then {HOW}"
            ) from None
        raise UserError(f"{flag}: NVIDIA apex does not load ({error}); {HOW}") from error


class ApexOptimizer:
    """An apex optimiser behind the interface of PyTorch's fused AdamW: `grad_scale` and `found_inf`.

    apex knows neither, so gradients are divided here, and what a bad step did is undone on the device from a
    copy: weights and moments take their size once more for the length of a step.
    """

    def __init__(
        self, name: str, groups: list[dict[str, Any]], *, lr: float, betas: tuple, eps: float
    ) -> None:
        kind = getattr(apex_module("optimizers", f"--optimizer {name}"), NAMES[name])
        # the clipping of FusedLAMB is ours already
        more = {"max_grad_norm": 0.0} if name == "apex-lamb" else {}
        self.inner = kind(groups, lr=lr, betas=betas, eps=eps, adam_w_mode=True, **more)
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def step(self) -> None:
        parameters = [p for group in self.inner.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_div_([p.grad for p in parameters], self.grad_scale)
        before = {id(value): value.clone() for value in self._changing(parameters)}
        self.inner.step()
        with torch.no_grad():
            for value in self._changing(parameters):
                # a moment that this step made was zero before
                old = before.get(id(value))
                old = torch.zeros_like(value) if old is None else old
                value.copy_(torch.where(self.found_inf > 0, old, value))

    def _changing(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        moments = [self.inner.state[p].values() for p in parameters if p in self.inner.state]
        return [*parameters, *(v for values in moments for v in values if isinstance(v, Tensor))]


def use_fused_layer_norm(model: nn.Module) -> int:
    """Replace every layer norm by apex's; the parameters are the same ones. Returns how many there were."""
    kind = apex_module("normalization", "the fused layer norm").FusedLayerNorm
    count = 0
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.LayerNorm:
                fused = kind(child.normalized_shape, eps=child.eps, elementwise_affine=True)
                fused.weight, fused.bias = child.weight, child.bias
                setattr(module, name, fused)
                count += 1
    return count
