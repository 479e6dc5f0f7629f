"""The build: what it asks pip for, what it decides, what comes out of it, and life without it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import groupvit_fast
from groupvit_fast.ops import library

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / sys.implementation.cache_tag
NO_TOOLS = not all(shutil.which(tool) for tool in ("cmake", "ninja", "c++"))
needs_tools = pytest.mark.skipif(NO_TOOLS, reason="no CMake, Ninja or C++ compiler")
needs_library = pytest.mark.skipif(not library.HAS_CPU, reason="nothing was compiled")


def run(*command, cwd=ROOT, ok=True, **environment):
    """Output of a command (both streams); with ok=False it must fail."""
    merged = {key: value for key, value in (os.environ | environment).items() if value is not None}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=merged,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert (result.returncode == 0) == ok, result.stdout
    return result.stdout


# ---- what pip is asked for ---------------------------------------------------------------------------------


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "build_support"))
    for name in ("backend", "locate_torch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import backend

    yield backend
    for name in ("backend", "locate_torch"):
        sys.modules.pop(name, None)


def test_torch_is_found_where_pip_hides_it(tmp_path):
    # What pip does: the same interpreter, and a sitecustomize that hides the environment behind an overlay.
    hide = "import sys\nsys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
    (tmp_path / "sitecustomize.py").write_text(hide)
    probe = "import importlib.util as u; print(u.find_spec('torch'))"
    hidden = {"PYTHONPATH": str(tmp_path), "PYTHONNOUSERSITE": "1"}
    assert run(sys.executable, "-c", probe, **hidden).strip() == "None"
    found = run(sys.executable, ROOT / "build_support" / "locate_torch.py", **hidden).strip()
    assert (Path(found) / "version.py").is_file()


@pytest.mark.parametrize("hook", ["get_requires_for_build_wheel", "get_requires_for_build_editable"])
def test_only_what_is_missing_is_required(backend, hook, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(backend, "torch_directory", lambda overlay: "/somewhere/torch")
    monkeypatch.setattr(backend, "_runs", lambda tool: True)
    assert getattr(backend, hook)() == []
    monkeypatch.setattr(backend, "torch_directory", lambda overlay: None)
    monkeypatch.setattr(backend, "_runs", lambda tool: tool != "ninja")
    assert getattr(backend, hook)() == ["ninja", "torch>=2.10"]


def test_a_tool_that_does_not_run_is_missing(backend, monkeypatch, tmp_path):
    broken = tmp_path / "cmake"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert not backend._runs("cmake")
    assert not backend._runs("no-such-tool")


def pins():
    """Name -> set of pinned versions in constraints.txt."""
    pinned: dict[str, set[str]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (clause,) = requirement.specifier
            assert clause.operator == "==", line
            pinned.setdefault(canonicalize_name(requirement.name), set()).add(clause.version)
    return pinned


def test_everything_that_is_installed_is_pinned():
    pinned = pins()
    assert pinned["torch"] == {"2.13.0"}
    waiting, seen = [Requirement("groupvit-fast[test]")], set()
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), ("", *requirement.extras)
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        assert name in pinned or name == "groupvit-fast", f"{name} is not in constraints.txt"
        for dependency in map(Requirement, importlib.metadata.requires(name) or []):
            wanted = not dependency.marker or any(dependency.marker.evaluate({"extra": e}) for e in extras)
            if wanted:
                dependency.marker = None
                waiting.append(dependency)
    assert len(seen) > 30


def test_no_index_is_named():
    for name in ("constraints.txt", "pyproject.toml", "Makefile", "setup.py", ".ci/run"):
        assert not re.search(r"index-url|find-links|https?://", (ROOT / name).read_text()), name


# ---- what CMake decides ------------------------------------------------------------------------------------


def configure(folder, *settings, ok=True, **environment):
    settings = ["-G", "Ninja", f"-DPython3_EXECUTABLE={sys.executable}", "-DGVIT_TESTS=OFF", *settings]
    return run("cmake", "-S", ROOT, "-B", folder, *settings, ok=ok, **environment)


@needs_tools
def test_cuda_is_decided_by_the_compiler_or_the_switch(tmp_path):
    said = configure(tmp_path / "off", GROUPVIT_CUDA="0")
    assert "building CPU library only (GROUPVIT_CUDA=0)" in said
    said = configure(tmp_path / "absent", "-DNVCC=", GROUPVIT_CUDA=None)
    assert "building CPU library only (no nvcc found)" in said
    said = configure(tmp_path / "asked", "-DNVCC=", GROUPVIT_CUDA="1", ok=False)
    assert "GROUPVIT_CUDA=1, but no nvcc was found" in said
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    said = configure(tmp_path / "broken", f"-DNVCC={broken}", GROUPVIT_CUDA=None)
    assert re.search(r"building CPU library only \(\S+/nvcc does not compile with", said)
    said = configure(tmp_path / "insisted", f"-DNVCC={broken}", GROUPVIT_CUDA="1", ok=False)
    assert "GROUPVIT_CUDA=1, but" in said
    said = configure(tmp_path / "unclear", GROUPVIT_CUDA="yes", ok=False)
    assert "GROUPVIT_CUDA is 'yes'; use 0, 1 or leave it unset" in said


@needs_tools
def test_the_formulas_alone_pass_in_plain_cpp(tmp_path):
    configure(tmp_path, "-DGVIT_TESTS=ON", GROUPVIT_CUDA="0")
    run("cmake", "--build", tmp_path, "--target", "test_formulas")
    assert "100% tests passed" in run("ctest", "--test-dir", tmp_path)


# ---- what comes out ----------------------------------------------------------------------------------------


def objects_and_headers():
    """Object file -> the project's files that it was compiled from, as Ninja has recorded them."""
    if not (BUILD / "build.ninja").exists():
        pytest.skip("not built here")
    recorded: dict[str, set[str]] = {}
    for line in run("ninja", "-C", BUILD, "-t", "deps").splitlines():
        if not line.startswith(" ") and "#deps" in line:
            current = recorded.setdefault(line.split(":")[0], set())
        elif line.strip().startswith(f"{ROOT}/"):
            current.add(Path(line.strip()).relative_to(ROOT).as_posix())
    return recorded


@needs_tools
def test_a_changed_file_rebuilds_what_includes_it():
    recorded = objects_and_headers()
    cpu = recorded["CMakeFiles/_C.dir/csrc/mask_upsample_cpu.cpp.o"]
    assert {"csrc/mask_upsample_cpu.cpp", "kernels/mask_upsample.cuh", "kernels/numeric.cuh"} <= cpu
    assert "kernels/mma.cuh" not in cpu
    cuda = recorded.get("CMakeFiles/_C_cuda.dir/csrc/mask_upsample.cu.o")
    assert cuda is None or {"csrc/mask_upsample.cu", "kernels/mask_upsample.cuh"} <= cuda
    assert not any("kernels/" in name for name in recorded["CMakeFiles/_native.dir/csrc/native.cpp.o"])


@needs_library
@pytest.mark.parametrize("name", ["_C", "_C_cuda"])
def test_only_the_stable_part_of_torch_is_linked(name):
    path = library.PACKAGE / f"{name}.so"
    if not path.exists() or not shutil.which("nm"):
        pytest.skip(f"no {path.name} or no nm")
    wanted = re.findall(r"\bU (\S.*)", run("nm", "-DC", "--undefined-only", path))
    assert any(symbol.startswith("torch_library_impl") for symbol in wanted)
    unstable = [symbol for symbol in wanted if re.search(r"\b(at|c10|caffe2|torch)::", symbol)]
    assert not unstable


def test_build_info_tells_what_was_built():
    info = groupvit_fast.build_info()
    assert info["package"] == groupvit_fast.__version__
    assert info["backend"] == ("native" if library.HAS_CPU else "reference")
    if info["compiler"] is None:
        pytest.skip("no native module here")
    assert info["torch_target"] == "2.10"
    assert info["compiler"].split()[0] in ("gcc", "clang")
    assert info["cpu_level"] in ("plain", "avx2", "avx512")
    assert (info["cuda"] is None) == (info["cuda_architectures"] is None)
    assert not (library.PACKAGE / "_C_cuda.so").exists() or {"80-real", "90-real"} <= set(
        info["cuda_architectures"].split()
    )


# ---- without a compiler ------------------------------------------------------------------------------------


def test_no_compiler_is_one_warning_and_asking_for_cuda_an_error(tmp_path):
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path / "lib"]
    bare = {"PATH": str(tmp_path), "CXX": None}
    said = run(*command, **bare, GROUPVIT_CUDA=None)
    assert said.count("no C++ compiler was found: installing without compiled operators") == 1
    assert not list(tmp_path.rglob("*.so"))
    assert "GROUPVIT_CUDA=1, but no C++ compiler was found" in run(
        *command, **bare, GROUPVIT_CUDA="1", ok=False
    )


WITHOUT = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from groupvit_fast import build_info, ops
    import groupvit_fast.ops.mask_upsample
    import torch
    torch.manual_seed(0)
    maps = torch.randn(1, 2, 3, 3, requires_grad=True)
    ops.upsample_masks(maps, (6, 6)).sum().backward()
    labels = ops.decode_masks(maps, torch.tensor([[4, 7]]), (6, 6))
print(build_info()["backend"], sorted(labels.unique().tolist()), [str(w.message) for w in caught])
"""


def test_the_package_works_uncompiled_with_one_warning(tmp_path):
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(library.PACKAGE, tmp_path / "groupvit_fast", ignore=ignored)
    said = run(sys.executable, "-c", WITHOUT, cwd=tmp_path, PYTHONPATH=str(tmp_path), GROUPVIT_OPS=None)
    assert said.startswith("reference [4, 7] [")
    assert said.count("no compiled operators: the slower reference runs; reinstall with a C++ compiler") == 1
    said = run(
        sys.executable, "-c", WITHOUT, cwd=tmp_path, PYTHONPATH=str(tmp_path), GROUPVIT_OPS="reference"
    )
    assert said.strip() == "reference [4, 7] []"


def test_an_unknown_backend_is_refused():
    with (
        pytest.raises(ValueError, match="backend must be native or reference, got 'fast'"),
        library.use_backend("fast"),
    ):
        pass
    said = run(sys.executable, "-c", "import groupvit_fast.ops", ok=False, GROUPVIT_OPS="fast")
    assert "GROUPVIT_OPS must be native or reference, got 'fast'" in said


@pytest.mark.slow
@needs_tools
def test_install_without_isolation_or_network(tmp_path):
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "build", ".venv", ".git", "runs", "*.egg-info")
    shutil.copytree(ROOT, tmp_path / "source", ignore=ignored)
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--target", tmp_path / "site"]
    run(sys.executable, "-m", "pip", "install", *options, ".", cwd=tmp_path / "source", GROUPVIT_CUDA="0")
    assert (tmp_path / "site" / "groupvit_fast" / "_C.so").exists()
    probe = "import groupvit_fast; print(groupvit_fast.__file__, groupvit_fast.build_info()['backend'])"
    said = run(sys.executable, "-c", probe, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert said.split() == [str(tmp_path / "site" / "groupvit_fast" / "__init__.py"), "native"]
