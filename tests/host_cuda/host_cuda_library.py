"""Build the CUDA sources for the host, and call them: the kernels of the package without a GPU.

`library()` compiles csrc/*.cu and the shim in this folder with g++ (cached by content) and loads the result.
Every fault that the shim finds becomes a `HostCudaError` with file and line.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SHIM_SOURCES = ("fibers.cpp", "memory_checks.cpp", "undefined_checks.cpp", "entry.cpp")
COMMON_FLAGS = ("-std=c++17", "-g", "-fPIC", "-Wall", "-Wextra", "-DGVIT_HOST_CUDA", "-fvisibility=hidden")
# The thread sanitizer's calls, answered by memory_checks.cpp; the other's, by undefined_checks.cpp.
CHECKED_FLAGS = (
    "-fsanitize=thread,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined"
    " -fno-strict-aliasing -fno-builtin-memcpy"
).split()


class HostCudaError(RuntimeError):
    """A fault that a kernel committed, or a launch that a GPU would have refused."""


def compiler() -> str | None:
    """The host compiler, or None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


class Library:
    """A compiled host run; `call` raises what it reports."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.functions = ctypes.CDLL(str(path))
        self.functions.gvit_host_image.restype = ctypes.c_size_t

    def call(self, name: str, *arguments: object) -> None:
        function = getattr(self.functions, f"gvit_host_{name}")
        function.restype = ctypes.c_char_p
        error = function(*arguments)
        if error is not None:
            raise HostCudaError(self._with_lines(error.decode()))

    def register(self, tensors: Sequence[tuple[str, int, int, bool, bool]]) -> None:
        """Tensors that the next launches may touch: (name, address, bytes, writable, already written)."""
        self._names = [name.encode() for name, *_ in tensors]
        self.functions.gvit_host_forget_tensors()
        for name, (_, address, size, writable, written) in zip(self._names, tensors, strict=True):
            self.functions.gvit_host_register_tensor(
                ctypes.c_void_p(address), ctypes.c_size_t(size), int(writable), int(written), ctypes.c_char_p(name)
            )

    def _with_lines(self, text: str) -> str:
        """Replace code addresses in brackets by file:line."""
        image = self.functions.gvit_host_image()

        def line(match: re.Match[str]) -> str:
            # A return address points behind the call.
            offset = int(match.group(1), 16) - image - 1
            command = ["addr2line", "-e", str(self.path), hex(offset)]
            found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
            return found[0] if found else match.group(0)

        return re.sub(r"\[(0x[0-9a-f]+)\]", line, text)


def source_files(root: Path = ROOT) -> list[Path]:
    """All that the library is made of, in a fixed order."""
    headers = sorted((root / "kernels").glob("*.cuh")) + sorted((root / "csrc").glob("*.h"))
    return headers + sorted((root / "csrc").glob("*.cu")) + sorted(p for p in HERE.iterdir() if p.suffix in (".h", ".cpp", ".cu"))


def build(root: Path = ROOT, extra_flags: Sequence[str] = ()) -> Path:
    """Compile the host run of the sources under `root` unless it is there already; returns the library."""
    cxx = compiler()
    if cxx is None:
        raise FileNotFoundError("no host compiler: install g++ or set CXX")
    digest = hashlib.sha256(repr((cxx, COMMON_FLAGS, CHECKED_FLAGS, tuple(extra_flags))).encode())
    for path in source_files(root):
        digest.update(path.name.encode() + path.read_bytes())
    cache = Path(tempfile.gettempdir()) / f"groupvit-fast-host-cuda-{os.getuid()}"
    library = cache / f"{digest.hexdigest()[:24]}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            os.replace(_compile(cxx, root, Path(folder), extra_flags), library)
    return library


def _compile(cxx: str, root: Path, folder: Path, extra_flags: Sequence[str]) -> Path:
    include = [f"-I{root}", f"-I{HERE}"]
    jobs = [(HERE / name, ["-O2"]) for name in SHIM_SOURCES]
    jobs += [(path, ["-O1", *CHECKED_FLAGS]) for path in [*sorted((root / "csrc").glob("*.cu")), HERE / "probes.cu"]]
    objects, running = [], []
    for source, flags in jobs:
        objects.append(folder / f"{source.stem}.o")
        command = [cxx, *COMMON_FLAGS, *flags, *extra_flags, *include, "-x", "c++", "-c", str(source), "-o", str(objects[-1])]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, errors = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"the host run does not compile:\n{errors}")
    library = folder / "host_cuda.so"
    link = [cxx, "-shared", "-Wl,-z,defs", "-Wl,-Bsymbolic", *extra_flags, "-o", str(library), *map(str, objects)]
    subprocess.run(link, check=True)
    return library


@functools.cache
def library() -> Library:
    """The host run of this checkout."""
    return Library(build())
