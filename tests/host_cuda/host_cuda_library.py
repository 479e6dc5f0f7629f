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
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = Path(tempfile.gettempdir()) / f"groupvit-fast-host-cuda-{os.getuid()}"
ROOT_VARIABLE, ADDRESS_VARIABLE = "GROUPVIT_HOST_CUDA_ROOT", "GROUPVIT_HOST_CUDA_ADDRESS"
COMPILERS_AT_ONCE = 2
KEPT_SECONDS = 7 * 24 * 3600
SHIM_SOURCES = ("fibers.cpp", "memory_checks.cpp", "undefined_checks.cpp", "entry.cpp")
COMMON_FLAGS = ("-std=c++17", "-g", "-fPIC", "-Wall", "-Wextra", "-DGVIT_HOST_CUDA", "-fvisibility=hidden")
# The thread sanitizer's calls, answered by memory_checks.cpp; the other's, by undefined_checks.cpp. Products
# and sums are rounded one by one, as the mask kernels are compiled for the GPU.
CHECKED_FLAGS = (
    "-fsanitize=thread,undefined",
    "-fno-sanitize=vptr",
    "-fno-sanitize-recover=undefined",
    "-fno-strict-aliasing",
    "-fno-builtin-memcpy",
    "-ffp-contract=off",
)
# The stock sanitizers instead, for what the shadow memory does not see: each thread's own arrays. The process
# must have libasan loaded first.
ADDRESS_FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined")


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
                ctypes.c_void_p(address),
                ctypes.c_size_t(size),
                int(writable),
                int(written),
                ctypes.c_char_p(name),
            )

    def traffic(self) -> tuple[int, int, int]:
        """Launches since the last look, and bytes of tensors that their threads read and wrote."""
        result = (ctypes.c_int64 * 3)()
        self.functions.gvit_host_traffic(result)
        return tuple(result)

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


def includes(path: Path, root: Path) -> set[Path]:
    """The files that a source includes, itself among them, as far as they lie under `root` or here."""
    found, waiting = set(), [path]
    while waiting:
        current = waiting.pop()
        if current in found:
            continue
        found.add(current)
        for name in re.findall(r'#include "(.+)"', current.read_text()):
            waiting += [p for p in (current.parent / name, root / name, HERE / name) if p.exists()][:1]
    return found


def build(root: Path = ROOT, flags: Sequence[str] = CHECKED_FLAGS, cache: Path = CACHE) -> Path:
    """Compile the host run of the sources under `root`; what is in CACHE or `cache` already is taken.

    Objects and libraries are kept by content, so a changed header compiles only what includes it.
    """
    cxx = compiler()
    if cxx is None:
        raise FileNotFoundError("no host compiler: install g++ or set CXX")
    cache.mkdir(parents=True, exist_ok=True)
    for old in [path for path in CACHE.glob("*.*o") if time.time() - path.stat().st_mtime > KEPT_SECONDS]:
        old.unlink(missing_ok=True)
    # The shadow memory does not watch itself.
    shim_flags = () if flags == CHECKED_FLAGS else flags
    shim = [name for name in SHIM_SOURCES if flags == CHECKED_FLAGS or name != "undefined_checks.cpp"]
    jobs = [(HERE / name, ["-O2", *shim_flags]) for name in shim]
    jobs += [(path, ["-O1", *flags]) for path in [*sorted((root / "csrc").glob("*.cu")), HERE / "probes.cu"]]
    objects, running = [], []
    for source, own_flags in jobs:
        command = [cxx, *COMMON_FLAGS, *own_flags, f"-I{root}", f"-I{HERE}", "-x", "c++", "-c", str(source)]
        same_anywhere = repr(command).replace(str(HERE), "shim").replace(str(root), "root")
        digest = hashlib.sha256(same_anywhere.encode())
        for path in sorted(includes(source, root), key=lambda p: p.name):
            digest.update(path.name.encode() + path.read_bytes())
        name = f"{source.stem}-{digest.hexdigest()[:20]}.o"
        objects.append(CACHE / name if (CACHE / name).exists() else cache / name)
        if not objects[-1].exists():
            running.append(_Compilation(command, objects[-1]))
        if len(running) == COMPILERS_AT_ONCE:
            running.pop(0).finish()
    for compilation in running:
        compilation.finish()
    digest = hashlib.sha256(" ".join(path.name for path in objects).encode())
    library = cache / f"host_cuda-{digest.hexdigest()[:20]}.so"
    if not library.exists():
        link = [cxx, "-shared", "-Wl,-z,defs", "-Wl,-Bsymbolic", *shim_flags]
        _Compilation([*link, *map(str, objects)], library).finish()
    return library


class _Compilation:
    """A compiler at work; its result appears under its name only when complete."""

    def __init__(self, command: Sequence[str], result: Path) -> None:
        self._result = result
        self._part = result.with_suffix(f".{os.getpid()}.part")
        command = [*command, "-o", str(self._part)]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def finish(self) -> None:
        _, errors = self._process.communicate()
        if self._process.returncode != 0:
            raise RuntimeError(f"the host run does not compile:\n{errors}")
        self._part.replace(self._result)


@functools.cache
def library() -> Library:
    """The host run of this checkout; the environment may name other sources, or the address sanitizer."""
    if os.environ.get(ADDRESS_VARIABLE):
        return Library(build(flags=ADDRESS_FLAGS))
    other = os.environ.get(ROOT_VARIABLE)
    return Library(build(Path(other), cache=Path(other)) if other else build())
