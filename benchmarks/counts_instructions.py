"""Instructions of the CPU kernels, by callgrind, which counts the same on an idle and on a busy machine."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import groupvit_fast
from groupvit_fast import ops
from groupvit_fast.ops import library

LEVEL = "avx2"  # valgrind knows no AVX-512
ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "_C.so"
# Switches the counting on around one call, and writes the counts with a name.
SWITCH = """
#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void stop(const char* name) { CALLGRIND_DUMP_STATS_AT(name); CALLGRIND_STOP_INSTRUMENTATION; }
"""


def conditions() -> dict[str, str] | str:
    """What the counts hold for, or why they cannot be had here."""
    if not library.HAS_CPU:
        return "nothing was compiled"
    if shutil.which("valgrind") is None or shutil.which("cc") is None:
        return "valgrind or a C compiler is missing"
    if not Path("/usr/include/valgrind/callgrind.h").exists():
        return "valgrind's headers are missing"
    info = groupvit_fast.build_info()
    if LEVEL not in info["cpu_features"]:
        return f"this processor has no {LEVEL}"
    return {"compiler": info["compiler"], "torch": torch.__version__.split("+")[0]}


def calls() -> dict[str, Callable[[], object]]:
    """The kernels at small official shapes: forward calls, and forward with backward."""
    noise_key = torch.tensor([7, 1])

    def assign(groups: int, tokens: int, dtype: torch.dtype, backward: bool) -> Callable[[], object]:
        query, key = (torch.randn(1, n, 384).to(dtype).requires_grad_(backward) for n in (groups, tokens))

        def run() -> object:
            output = ops.gumbel_assign(query, key, key, noise_key=noise_key).output
            return torch.autograd.grad(output.sum(), (query, key)) if backward else output

        return run

    def attend(groups: int, tokens: int, backward: bool) -> Callable[[], object]:
        tensors = [torch.randn(1, 6, n, 64, requires_grad=backward) for n in (groups, tokens, tokens)]

        def run() -> object:
            output = ops.group_attention(*tensors)
            return torch.autograd.grad(output.sum(), tensors) if backward else output

        return run

    maps, scores = torch.randn(1, 8, 28, 28), torch.rand(1, 8, 20)
    return {
        "gumbel_assign 64x196 forward": assign(64, 196, torch.float32, False),
        "gumbel_assign 64x196 both": assign(64, 196, torch.float32, True),
        "gumbel_assign 64x196 both bf16": assign(64, 196, torch.bfloat16, True),
        "gumbel_assign 8x64 both": assign(8, 64, torch.float32, True),
        "group_attention 64x196 both": attend(64, 196, True),
        "group_attention 8x64 both": attend(8, 64, True),
        "upsample_masks 28 to 224": lambda: ops.upsample_masks(maps, (224, 224)),
        "decode_masks 28 to 224": lambda: ops.decode_masks(
            maps, scores, (224, 224), background_threshold=0.5
        ),
    }


def measure() -> dict[str, int]:
    """Instructions inside our library by call."""
    with tempfile.TemporaryDirectory() as folder:
        source, switch = Path(folder) / "switch.c", Path(folder) / "switch.so"
        source.write_text(SWITCH)
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", switch, source], check=True)
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--compress-strings=no"]
        command += [f"--callgrind-out-file={folder}/out", sys.executable, __file__, str(switch)]
        fixed = {
            "GROUPVIT_CPU": LEVEL,
            "OMP_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(command, env=os.environ | fixed, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"callgrind failed:\n{done.stderr[-2000:]}")
        found = dict(map(read_dump, Path(folder).glob("out.*")))
    return {name: found[name] for name in calls()}


def read_dump(path: Path) -> tuple[str, int]:
    """(name, instructions inside our library) of one dump; the cost of calls belongs to whom they call."""
    text = path.read_text(errors="replace")
    name = re.search(r"^desc: Trigger: Client Request: (.*)$", text, flags=re.MULTILINE)
    total, own, skip = 0, False, False
    for line in text.splitlines():
        if line.startswith("ob="):
            own = line.endswith(LIBRARY)
        elif line.startswith("calls="):
            skip = True
        elif own and re.match(r"[+\-*\d]", line):
            total += 0 if skip else int(line.split()[1])
            skip = False
        elif re.match(r"[+\-*\d]", line):
            skip = False
    return (name.group(1) if name else "", total)


def _drive(switch: str) -> None:
    """What runs under callgrind: every call twice, the second time counted."""
    functions = ctypes.CDLL(switch)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name, call in calls().items():
        call()
        functions.start()
        call()
        functions.stop(name.encode())


if __name__ == "__main__":
    _drive(sys.argv[1])
