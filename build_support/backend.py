"""The build backend: setuptools, plus the build requirements that this machine really lacks.

torch, CMake and Ninja are asked for only where the environment has none, so that a plain
`pip install -e .` compiles against the torch that is already there and downloads no second one.
"""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

from locate_torch import torch_directory
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - the hooks that need no change
from setuptools.build_meta import __all__ as __all__


def _runs(tool: str) -> bool:
    # A virtual environment's own cmake is a Python script that the isolated build cannot import: try it.
    path = shutil.which(tool)
    return path is not None and subprocess.run([path, "--version"], capture_output=True).returncode == 0


def _missing() -> list[str]:
    wanted = [tool for tool in ("cmake", "ninja") if not _runs(tool)]
    return wanted if torch_directory(overlay=False) else [*wanted, "torch>=2.10"]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _missing()


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _missing()
