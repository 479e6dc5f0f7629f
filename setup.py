"""Drives CMake and Ninja; CMakeLists.txt is the only list of sources, flags and architectures."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / sys.implementation.cache_tag  # kept between runs, so that a rebuild is incremental
LIBRARIES = ("_C", "_C_cuda", "_native")


class CMakeBuild(build_ext):
    """Builds all libraries with one CMake run and installs those that came out of it."""

    def run(self) -> None:
        missing = self._missing_tools()
        if missing and os.environ.get("GROUPVIT_CUDA") == "1":
            raise SystemExit(f"groupvit_fast: GROUPVIT_CUDA=1, but {missing}")
        if missing:
            self.warn(
                f"groupvit_fast: {missing}: installing without compiled operators, same results, slower"
            )
            return
        cache = BUILD / "CMakeCache.txt"
        if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
            shutil.rmtree(BUILD)  # made for a checkout elsewhere and copied along
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        package = ROOT if self.inplace else Path(self.build_lib).resolve()
        for step in (
            ["-S", ROOT, "-B", BUILD, "-G", "Ninja", *self._settings()],
            ["--build", BUILD, "--parallel", jobs],
            ["--install", BUILD, "--prefix", package / "groupvit_fast"],
        ):
            subprocess.run(["cmake", *map(str, step)], check=True)

    def _settings(self) -> list[str]:
        # Ninja and the interpreter may come from a build environment that is gone next time: name them anew.
        ninja, python = shutil.which("ninja"), sys.executable
        settings = {"CMAKE_MAKE_PROGRAM": ninja, "CMAKE_BUILD_TYPE": "Release", "Python3_EXECUTABLE": python}
        return [f"-D{name}={value}" for name, value in settings.items()] + ["-DGVIT_TESTS=OFF"]

    def _missing_tools(self) -> str | None:
        compiler = os.environ.get("CXX", "").split(" ")[0]
        if not any(shutil.which(name) for name in (compiler, "c++", "g++", "clang++") if name):
            return "no C++ compiler was found"
        absent = [tool for tool in ("cmake", "ninja") if not shutil.which(tool)]
        return f"{' and '.join(absent)} not found" if absent else None

    def _built(self) -> list[str]:
        folder = ROOT if self.inplace else Path(self.build_lib)
        paths = (folder / "groupvit_fast" / f"{name}.so" for name in LIBRARIES)
        return [str(path) for path in paths if path.exists()]

    def get_source_files(self) -> list[str]:
        return ["CMakeLists.txt", *map(str, [*Path("csrc").glob("*"), *Path("kernels").glob("*")])]

    def get_outputs(self) -> list[str]:
        return self._built()

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    ext_modules=[Extension(f"groupvit_fast.{name}", sources=[]) for name in LIBRARIES],
    cmdclass={"build_ext": CMakeBuild},
)
