"""What ptxas says of every kernel on every target: registers, shared memory, spills. Needs nvcc, no GPU.

python tests/host_cuda/ptxas_table.py > benchmarks/results/ptxas.txt
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from host_cuda_library import ROOT

NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
SOURCES = sorted(path.name for path in (ROOT / "csrc").glob("*.cu"))
BUILD = (ROOT / "CMakeLists.txt").read_text()
ARCHITECTURES = re.search(r"foreach\(architecture ([\d ]+)\)", BUILD).group(1).split()
# What the build gives a source beside the common flags: they decide how many registers a kernel takes.
OWN_FLAGS = dict(re.findall(r"\(csrc/(\w+\.cu) PROPERTIES COMPILE_OPTIONS (\S+)\)", BUILD))


class Kernel(NamedTuple):
    name: str
    registers: int
    shared_bytes: int  # of fixed size; what a launch asks for comes on top
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


def compiled_kernels(source: str, architecture: str) -> list[Kernel]:
    """Compile one CUDA source for one target; a warning is an error."""
    with tempfile.TemporaryDirectory() as folder:
        command = [NVCC, "-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-I{ROOT}"]
        command += [OWN_FLAGS[source]] if source in OWN_FLAGS else []
        command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}", "-Xptxas", "-v"]
        command += ["-Werror", "all-warnings", "-cubin", str(ROOT / "csrc" / source)]
        run = subprocess.run(
            [*command, "-o", str(Path(folder) / "out.cubin")], capture_output=True, text=True
        )
    if run.returncode != 0:
        raise RuntimeError(f"{source} does not compile for sm_{architecture}\n{run.stderr}")
    return kernels_in(run.stdout + run.stderr)


def readable(name: str) -> str:
    """The name of a kernel as it is written, without its arguments."""
    run = subprocess.run(["c++filt", "-p", name], capture_output=True, text=True)
    return run.stdout.strip().removeprefix("void ").replace("gvit::", "") if run.returncode == 0 else name


def main() -> None:
    rows = []
    for source in SOURCES:
        for architecture in ARCHITECTURES:
            for kernel in sorted(compiled_kernels(source, architecture)):
                rows.append((readable(kernel.name), f"sm_{architecture}", *map(str, kernel[1:])))
    head = ("kernel", "target", "registers", "shared", "stack", "spilled")
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells))


if __name__ == "__main__":
    main()
