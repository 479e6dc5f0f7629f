"""Every CUDA source compiles for every target without a register spill, as far as nvcc is here to say so."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from host_cuda_library import ROOT

NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
SOURCES = sorted(path.name for path in (ROOT / "csrc").glob("*.cu"))
ARCHITECTURES = (
    re.search(r"foreach\(architecture ([\d ]+)\)", (ROOT / "CMakeLists.txt").read_text()).group(1).split()
)


class Kernel(NamedTuple):
    name: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spilled_bytes: int


def kernels_in(report: str) -> list[Kernel]:
    """What `ptxas -v` says of each kernel."""
    found = []
    for part in report.split("Compiling entry function '")[1:]:
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        ).groups()
        registers = re.search(r"Used (\d+) registers", part).group(1)
        shared = re.search(r"(\d+) bytes smem", part)
        numbers = (registers, shared.group(1) if shared else 0, stack, int(stores) + int(loads))
        found.append(Kernel(part.split("'")[0], *map(int, numbers)))
    return found


REPORT = """ptxas info    : Compiling entry function '_Z6kernelPf' for 'sm_80'
ptxas info    : Function properties for _Z6kernelPf
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size, 512 bytes smem
"""


def test_a_report_is_read():
    assert kernels_in(REPORT) == [Kernel("_Z6kernelPf", 255, 512, 16, 20)]


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_no_kernel_spills(source, architecture, tmp_path: Path):
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    command = [
        NVCC,
        "-std=c++17",
        "-O3",
        "--expt-relaxed-constexpr",
        f"-I{ROOT}",
        "-gencode",
        target,
        "-Xptxas",
        "-v",
    ]
    command += [
        "-Werror",
        "all-warnings",
        "-cubin",
        str(ROOT / "csrc" / source),
        "-o",
        str(tmp_path / "out.cubin"),
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    kernels = kernels_in(run.stdout + run.stderr)
    assert kernels
    for kernel in kernels:
        print(f"sm_{architecture}", *kernel)
    assert not [kernel for kernel in kernels if kernel.spilled_bytes or kernel.stack_bytes]
