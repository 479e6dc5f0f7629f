"""Loads the compiled operators and decides whether they or the reference run.

`_C` holds every operator's schema and CPU kernel, `_C_cuda` the CUDA kernels; both sit beside the package.
Where one is missing, the operators run on `reference` instead, with one warning.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGE = Path(__file__).resolve().parent.parent
BACKENDS = ("native", "reference")
REMEDY = "reinstall with a C++ compiler at hand (pip install -e .), or set GROUPVIT_OPS=reference"


def _load(name: str) -> bool:
    path = PACKAGE / f"{name}.so"
    if not path.exists():
        return False
    try:
        torch.ops.load_library(path)
    except OSError as error:
        warnings.warn(f"groupvit_fast: {path.name} does not load ({error}); {REMEDY}", stacklevel=2)
        return False
    return True


def _first_backend() -> str:
    wish = os.environ.get("GROUPVIT_OPS", "native")
    if wish not in BACKENDS:
        raise ValueError(f"GROUPVIT_OPS must be native or reference, got {wish!r}")
    return wish


HAS_CPU = _load("_C")
HAS_CUDA = HAS_CPU and torch.cuda.is_available() and _load("_C_cuda")
_backend = _first_backend()
if _backend == "native" and not (HAS_CPU and (HAS_CUDA or not torch.cuda.is_available())):
    _what = "CUDA operators" if HAS_CPU else "operators"
    warnings.warn(f"groupvit_fast: no compiled {_what}: the slower reference runs; {REMEDY}", stacklevel=2)


def backend() -> str:
    """The back end in use: "native" (compiled kernels) or "reference" (plain PyTorch)."""
    return _backend if HAS_CPU else "reference"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operators on "native" or "reference" within the block.

    Raises:
        ValueError: unknown name.
        RuntimeError: "native" where nothing was compiled.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"backend must be native or reference, got {name!r}")
    if name == "native" and not HAS_CPU:
        raise RuntimeError(f"backend native: no compiled operators here; {REMEDY}")
    before, _backend = _backend, name
    try:
        yield
    finally:
        _backend = before


def runs_native(tensor: Tensor) -> bool:
    """Whether an operator on this tensor runs compiled: the backend is native and knows the device."""
    if backend() == "reference":
        return False
    return HAS_CUDA if tensor.is_cuda else tensor.device.type in ("cpu", "meta")


@cache
def cpu_flags() -> frozenset[str]:
    """Maker and features of the processor as Linux names them; empty where it does not tell."""
    try:
        return frozenset(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return frozenset()


def build_info() -> dict[str, Any]:
    """What this build is: versions of package, compiler, torch headers and CUDA, CPU features, backend."""
    try:
        info = importlib.import_module("groupvit_fast._native").build_info()
    except ImportError:
        info = {"package": importlib.import_module("groupvit_fast").__version__, "compiler": None}
        info |= {"torch_target": None, "torch_headers": None, "cuda": None, "cuda_architectures": None}
        info |= {"cpu_features": [], "cpu_level": None}
    return info | {"torch": torch.__version__, "backend": backend(), "cuda_library": HAS_CUDA}
