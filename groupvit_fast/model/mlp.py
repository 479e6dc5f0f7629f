"""The MLPs of both encoders, which keep only one of the two large tensors between their layers.

Shapes: R rows (all leading axes), I inputs, K hidden channels, O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupvit_fast.model.linear import Activation, Linear, Product

QUICK = 1.702


def quick_gelu(x: Tensor) -> Tensor:
    """The approximation of GELU that CLIP's text transformer was trained with."""
    return x * torch.sigmoid(QUICK * x)


def _gelu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward.grad_input(gradient, x, grad_input=gradient)


def _quick_gelu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward.grad_input(gradient, QUICK * x, grad_input=gradient)


GELU = Activation(F.gelu, _gelu_backward)
QUICK_GELU = Activation(quick_gelu, _quick_gelu_backward)


class MLP(nn.Module):
    """Two Linear layers with an activation between; works on the last dimension.

    In training the activation is computed again in the backward pass instead of kept: a third of what a
    transformer block keeps, for 0.6 % of a step's time (the official preset, batch 8: 523 -> 428 MB beside
    weights and moments).
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, activation: Activation = GELU) -> None:
        super().__init__()
        self.fc1 = Linear(inputs, hidden)
        self.fc2 = Linear(hidden, outputs)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """x [...,I] -> [...,O]."""
        if self.activation is GELU and self.fc1.uses_packed(x):
            return self.fc2(self.fc1.packed(x, "gelu"))
        hidden = self.fc1(x)
        if not (torch.is_grad_enabled() and hidden.requires_grad and self._computes_again()):
            return self.fc2(self.activation.forward(hidden))
        onednn = self.fc2.prefers_onednn(hidden)
        weight, bias = (p.to(hidden.dtype) for p in (self.fc2.weight, self.fc2.bias))
        return Product.apply(hidden, weight, bias, self.activation, onednn)

    def _computes_again(self) -> bool:
        """Not when compiled (the compiler chooses by itself), nor around a layer that somebody changed."""
        second = self.fc2
        changed = type(second) is not Linear or second._forward_hooks or second._forward_pre_hooks
        return not (changed or torch.compiler.is_compiling())


class TokenMixer(MLP):
    """An MLP over the token dimension, as in MLP-Mixer: [B,N,C] -> [B,outputs,C]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)
