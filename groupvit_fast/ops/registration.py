"""What the compiled operators need beside their schema, in a form shared by all of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import library

NAMESPACE = "groupvit_fast"
Transform = torch._C._functorch.TransformType


def runs_native(tensor: Tensor) -> bool:
    """Whether the compiled kernel runs; float64 is for gradient checks and has no CUDA kernel."""
    if tensor.is_cuda and tensor.dtype == torch.float64:
        return False
    return library.runs_native(tensor) and not needs_formula()


def needs_formula() -> bool:
    """Whether forward-mode AD or a derivative of torch.func is at work: plain PyTorch has both.

    An operator with a registered gradient has neither: the first would silently give zero.
    """
    if forward_ad._current_level >= 0 and not torch.compiler.is_compiling():
        return True
    return bool(_transforms() & {Transform.Grad, Transform.Jvp})


def is_mapped() -> bool:
    """Whether the call is under vmap."""
    return Transform.Vmap in _transforms()


def mapped_noise(name: str) -> RuntimeError:
    """Noise is numbered by the element of the whole batch, which a mapped call does not see."""
    return RuntimeError(f"{name}: noise_key is not supported under vmap; put the mapped dimension into B")


def _transforms() -> set[Transform]:
    """What torch.func does to the call, at any depth."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return set()
    return {interpreter.key() for interpreter in torch._C._functorch.get_interpreter_stack()}


below_autograd = torch._C._AutoDispatchBelowAutograd  # context: operators without their registered gradient


def runs_directly() -> bool:
    """Whether nothing compiles or transforms (torch.func) the call, which needs the registered operator."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def in_backward() -> AbstractContextManager[object]:
    """Context of an operator in a backward: below autograd, unless that is differentiated or transformed."""
    return below_autograd() if runs_directly() and not torch.is_grad_enabled() else nullcontext()


def statistic_dtype(tensor: Tensor) -> torch.dtype:
    """dtype of counts and saved statistics: that of the accumulation."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def refuse_second_derivative(name: str) -> None:
    """Differentiating the operator `<name>_backward` is an error that says what to do, not a silent zero."""

    def backward(ctx, *gradients):
        raise RuntimeError(
            f"{name}: the compiled operator has no second derivative; "
            "compute it under groupvit_fast.ops.use_backend('reference')"
        )

    torch.library.register_autograd(f"{NAMESPACE}::{name}_backward", backward)


def register_batching(name: str, *, fixed: tuple[int, ...] = ()) -> None:
    """`torch.vmap` of an operator whose tensors all begin with B: the mapped dimension joins B.

    `fixed` are the positions of tensor arguments that must be the same for every mapped call, and must be
    absent under vmap: noise is numbered by the element of the whole batch.
    """
    operator = getattr(torch.ops.groupvit_fast, name)

    def rule(info, in_dims, *arguments):
        if any(arguments[position] is not None for position in fixed):
            raise mapped_noise(name)
        mapped = [_join_batch(a, dim, info.batch_size) for a, dim in zip(arguments, in_dims, strict=True)]
        results = operator(*mapped)
        split = tuple(r if r.dim() == 1 else r.unflatten(0, (info.batch_size, -1)) for r in results)
        return split, tuple(None if r.dim() == 1 else 0 for r in results)

    torch.library.register_vmap(f"{NAMESPACE}::{name}", rule)


def _join_batch(argument, dim: int | None, batch_size: int):
    if not isinstance(argument, Tensor):
        return argument
    tensor = argument.movedim(dim, 0) if dim is not None else argument.expand(batch_size, *argument.shape)
    return tensor.flatten(0, 1)


def fake(name: str) -> Callable[[Callable], Callable]:
    """Decorator: the shapes, dtypes and strides of an operator's results, for the compiler."""
    return torch.library.register_fake(f"{NAMESPACE}::{name}")
