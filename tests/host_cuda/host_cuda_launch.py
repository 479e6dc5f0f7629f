"""Parameter structs of the launch functions, and the tensors that one launch may touch."""

from __future__ import annotations

import ctypes

import torch
from host_cuda_library import library
from torch import Tensor

STORAGE = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


class Matrices(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("row", ctypes.c_int64),
    ]


def _struct(name: str, **fields: object) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


AttentionParams = _struct(
    "AttentionParams",
    **dict.fromkeys(("query", "key", "value", "output"), Matrices),
    lse=ctypes.c_void_p,
    **dict.fromkeys(("grad_output", "grad_query", "grad_key", "grad_value"), Matrices),
    workspace=ctypes.c_void_p,
    **dict.fromkeys(("samples", "heads", "groups", "tokens", "depth"), ctypes.c_int64),
    scale=ctypes.c_double,
    storage=ctypes.c_int,
)

AssignParams = _struct(
    "AssignParams",
    **dict.fromkeys(("query", "key", "value", "output"), Matrices),
    **dict.fromkeys(("bias", "noise_key", "index", "count", "lse"), ctypes.c_void_p),
    **dict.fromkeys(("grad_output", "grad_query", "grad_key", "grad_value"), Matrices),
    **dict.fromkeys(("grad_count", "grad_bias", "workspace"), ctypes.c_void_p),
    **dict.fromkeys(("samples", "groups", "tokens", "channels"), ctypes.c_int64),
    **dict.fromkeys(("scale", "tau", "eps"), ctypes.c_double),
    hard=ctypes.c_bool,
    storage=ctypes.c_int,
)


def _span(tensor: Tensor) -> int:
    """Elements from the first to the last, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def pieces(tensor: Tensor) -> list[Tensor]:
    """Parts of a tensor without a gap between them that its outermost dimensions leave."""
    if tensor.dim() > 1 and tensor.stride(0) > _span(tensor[0]):
        return [piece for part in tensor for piece in pieces(part)]
    return [tensor]


class Launch:
    """Collects the tensors of one launch: what may be read, what may be written."""

    def __init__(self) -> None:
        self._tensors: list[tuple[str, int, int, bool, bool]] = []
        self._kept: list[Tensor] = []

    def _register(self, name: str, tensor: Tensor, writable: bool) -> int:
        self._kept.append(tensor)
        for piece in pieces(tensor) if tensor.numel() > 0 else []:
            size = _span(piece) * tensor.element_size()
            self._tensors.append((name, piece.data_ptr(), size, writable, not writable))
        return tensor.data_ptr()

    def pointer(self, name: str, tensor: Tensor | None, *, result: bool = False) -> int | None:
        """A tensor that the kernel takes as one contiguous array."""
        if tensor is None:
            return None
        return self._register(name, tensor if result else tensor.contiguous(), result)

    def matrices(self, name: str, tensor: Tensor | None, *, result: bool = False) -> Matrices:
        """A tensor of matrices with any strides but that of the last dimension."""
        if tensor is None:
            return Matrices(None, 0, 0, 0)
        if not result and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            tensor = tensor.contiguous()
        head = tensor.stride(1) if tensor.dim() == 4 else 0
        return Matrices(self._register(name, tensor, result), tensor.stride(0), head, tensor.stride(-2))

    def workspace(self, floats: int) -> int | None:
        """Memory between the kernels of one launch."""
        return self.pointer("workspace", torch.empty(floats), result=True)

    def run(self, operator: str, params: ctypes.Structure) -> None:
        library().register(self._tensors)
        library().call(operator, ctypes.byref(params))
