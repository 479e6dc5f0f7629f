"""The compiled module, for code that must start without torch and work without a compiler."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType


@cache
def native_module(function: str) -> ModuleType | None:
    """The compiled module, or None if the package was installed without a compiler or it lacks `function`."""
    try:
        module = importlib.import_module("groupvit_fast._native")
    except ImportError:
        return None
    return module if hasattr(module, function) else None
