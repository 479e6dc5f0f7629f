"""The linear layer of both encoders: PyTorch's, with oneDNN's products where those are the faster ones.

In evaluation the weights can be laid out once for all products: see `prepacked`.

Shapes: R rows (all leading axes), I inputs, O outputs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from groupvit_fast.ops.library import cpu_flags

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
LEAST_PRODUCTS = 1 << 24
"""R * I * O from which oneDNN is asked: smaller products cost as much either way."""
PACKED_ROWS = 4240
"""R that the layout of packed weights is chosen for, 5 windows of 448 px with their group tokens."""


class Linear(nn.Linear):
    """`nn.Linear`, same parameters and same results to rounding; large float32 products on AMD by oneDNN.

    PyTorch multiplies float32 matrices by MKL, which reaches 81 to 86 % of the FMA units' peak on a Zen 4
    core with the shapes of training; oneDNN reaches 92 to 95 % forward and for the gradient of the input,
    and is no better for that of the weight, which stays with MKL.
    """

    packed: PackedProduct | None = None
    """What takes the place of the product in evaluation; see `prepacked`."""

    def forward(self, x: Tensor) -> Tensor:
        """x [...,I] -> [...,O]."""
        if self.uses_packed(x):
            return self.packed(x)
        if self.prefers_onednn(x):
            return Product.apply(x, self.weight, self.bias, IDENTITY, True)
        return F.linear(x, self.weight, self.bias)

    def uses_packed(self, x: Tensor) -> bool:
        """Whether this call multiplies by the packed weight: no gradients, and the type it was packed in."""
        if self.packed is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        autocast = torch.is_autocast_enabled("cpu")
        return self.packed.dtype == (torch.get_autocast_dtype("cpu") if autocast else x.dtype)

    def prefers_onednn(self, x: Tensor) -> bool:
        """Whether the product with x [...,I] is one of those that oneDNN computes faster."""
        return (
            not torch.compiler.is_compiling()  # first: a comparison of sizes would bind those of a graph
            and x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and x.numel() * self.out_features >= LEAST_PRODUCTS
            and x.is_contiguous()
            and not torch.is_autocast_enabled("cpu")
            and torch.backends.mkldnn.enabled
            and onednn_is_faster()
        )


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN is there and the processor one on which its products were measured faster than MKL's.

    By the processor's name and not by a measurement, so that a run gives the same bits when it is repeated.
    """
    amd = "AuthenticAMD" in cpu_flags()
    return HAS_ONEDNN and amd and torch.backends.cpu.get_cpu_capability() == "AVX512"


@dataclass(frozen=True)
class PackedProduct:
    """What one `Linear` computes, in `dtype` and with its weight in a layout of oneDNN's own."""

    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype

    @classmethod
    def of(cls, layer: Linear, dtype: torch.dtype) -> PackedProduct:
        weight = layer.weight.detach().to(dtype).contiguous()
        bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        return cls(torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS), bias, dtype)

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        """x [...,I] -> [...,O]; "gelu" is applied while the results are still in registers."""
        x = x.to(self.dtype)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, activation, [], "none")


@contextmanager
def prepacked(model: nn.Module, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Within the block every `Linear` of `model` multiplies by a copy of its weight, laid out once.

    For evaluation: the weights must stay as they are, and calls that record gradients use none of the copies.
    With bfloat16 the copies serve calls under autocast, which would convert each weight in every call.
    Nothing happens where oneDNN is not the faster one, or the model is not on a CPU.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, Linear)] if _pays(model, dtype) else []
    try:
        for layer in layers:
            layer.packed = PackedProduct.of(layer, dtype)
        yield
    finally:
        for layer in layers:
            layer.packed = None


def _pays(model: nn.Module, dtype: torch.dtype) -> bool:
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return False
    if not (HAS_ONEDNN and torch.backends.mkldnn.enabled):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 and onednn_is_faster()


class Activation(NamedTuple):
    """A function of each element; `backward` makes the result's gradient, in place, that of the input."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


IDENTITY = Activation(lambda x: x, lambda gradient, x: gradient)


class Product(torch.autograd.Function):
    """activation(x [...,I]) @ weight [O,I] transposed + bias [O], all of one type; keeps x and weight."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation, onednn: bool
    ) -> Tensor:
        return product(activation.forward(x), weight, bias, onednn)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.activation, ctx.onednn = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias, *_ = ctx.needs_input_grad
        rows = gradient.reshape(-1, weight.shape[0])
        of_x = of_weight = None
        if for_weight:
            of_weight = rows.T @ ctx.activation.forward(x).reshape(-1, weight.shape[1])
        if for_x:
            of_x = ctx.activation.backward(product(rows, weight.T, None, ctx.onednn).view_as(x), x)
        return of_x, of_weight, rows.sum(0) if for_bias else None, None, None


def product(x: Tensor, weight: Tensor, bias: Tensor | None, onednn: bool) -> Tensor:
    """x [...,I] @ weight [O,I] transposed + bias [O], by oneDNN or by PyTorch's own choice."""
    return _onednn(x, weight, bias) if onednn else F.linear(x, weight, bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


if HAS_ONEDNN:  # PyTorch's FlopCounterMode does not know the operator
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_flops)
