"""GroupViT: semantic segmentation learnt from captions alone.

`load_model(path)` and `create_model(preset)` give the model, `ops` the operators alone, `build_info()` what
was compiled. Everything is imported when it is first asked for, so that `import groupvit_fast` is instant.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "build_info": "groupvit_fast.ops.library",
    "create_model": "groupvit_fast.model",
    "load_model": "groupvit_fast.model",
}
__all__ = ["__version__", "build_info", "create_model", "load_model", "ops"]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("groupvit_fast.ops")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
