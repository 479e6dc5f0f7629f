"""Argument checks of the public operators: same order and wording everywhere.

Every check raises `ValueError` with one line that names the argument, what was wanted and what came.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_tensors(*arguments: tuple[str, Tensor | None, str]) -> dict[str, int]:
    """Check rank and sizes of `(name, tensor, letters)` triples and return the size of each letter.

    `letters` names the dimensions ("BSC"); a letter must have the same size wherever it occurs. Arguments
    that are None are skipped, and the first argument decides dtype and device of all.
    """
    sizes: dict[str, int] = {}
    owner: dict[str, str] = {}
    first_name, first, _ = arguments[0]
    for name, tensor, letters in arguments:
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
        shape = tensor.shape
        if len(shape) != len(letters):
            raise ValueError(f"{name} must be {_form(letters)}, got shape {list(shape)}")
        for letter, size in zip(letters, shape, strict=True):
            if letter not in sizes:
                sizes[letter], owner[letter] = size, name
            elif sizes[letter] != size:
                wanted = f"{_form(letters)} with {letter} = {sizes[letter]} as in {owner[letter]}"
                raise ValueError(f"{name} must be {wanted}, got shape {list(shape)}")
        if tensor is first:
            _check_floating(name, tensor)
        elif tensor.dtype != first.dtype:
            _check_floating(name, tensor)
            raise ValueError(f"{name} must have the dtype of {first_name}, {first.dtype}, got {tensor.dtype}")
        elif tensor.device != first.device:
            wanted = f"on the device of {first_name}, {first.device}"
            raise ValueError(f"{name} must be {wanted}, got {tensor.device}")
    return sizes


def _form(letters: str) -> str:
    return f"[{', '.join(letters)}]"


def _check_floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        raise ValueError(f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")


def check_at_least_one(name: str, letter: str, sizes: dict[str, int]) -> None:
    """Refuse a zero size where the operator has no meaning without an element."""
    if sizes[letter] < 1:
        raise ValueError(f"{name} must have {letter} >= 1, got {letter} = {sizes[letter]}")


def check_number(name: str, value: float, *, above: float = -math.inf, at_least: float = -math.inf) -> float:
    """Return `value` as a finite float above or at least a bound."""
    if isinstance(value, Tensor):
        raise ValueError(f"{name} must be a Python number (a tensor would need a host synchronisation)")
    number = float(value)
    if not -math.inf < number < math.inf:  # not isfinite: the compiler may trace the number as a symbol
        raise ValueError(f"{name} must be finite, got {number}")
    if not number > above:
        raise ValueError(f"{name} must be above {above:g}, got {number:g}")
    if not number >= at_least:
        raise ValueError(f"{name} must be at least {at_least:g}, got {number:g}")
    return number


def check_noise_key(noise_key: Tensor | None, device: torch.device) -> None:
    """`noise_key` is None or int64[2] (key, offset) on `device`."""
    if noise_key is None:
        return
    if not isinstance(noise_key, Tensor):
        raise ValueError(f"noise_key must be a tensor int64[2], key and offset, got {noise_key!r}")
    if noise_key.dtype != torch.int64 or noise_key.dim() != 1 or noise_key.shape[0] != 2:
        came = f"{noise_key.dtype} of shape {list(noise_key.shape)}"
        raise ValueError(f"noise_key must be a tensor int64[2], key and offset, got {came}")
    if noise_key.device != device:
        raise ValueError(f"noise_key must be on {device}, got {noise_key.device}")


def apply_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, cast floating tensors to its dtype as `torch.matmul` does; equal objects stay one."""
    kind = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    result: list[Tensor | None] = []
    for position, tensor in enumerate(tensors):
        earlier = next((i for i in range(position) if tensors[i] is tensor), None)
        if earlier is not None:
            result.append(result[earlier])
        elif isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64:
            result.append(tensor.to(dtype))
        else:
            result.append(tensor)
    return tuple(result)
