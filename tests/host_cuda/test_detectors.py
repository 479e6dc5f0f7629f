"""Each detector of the host run fires on a kernel with that fault, names its line, and on no sound kernel."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from host_cuda_library import ADDRESS_VARIABLE, HERE, HostCudaError, compiler, library

pytestmark = pytest.mark.skipif(compiler() is None, reason="no host compiler")
PROBES = (HERE / "probes.cu").read_text()


def probes() -> list[tuple[str, str | None, int | None]]:
    """(name, expected words, expected line) of every PROBE in probes.cu."""
    found: list[tuple[str, str | None, int | None]] = []
    for number, line in enumerate(PROBES.splitlines(), start=1):
        if opened := re.match(r"PROBE\((\w+)\)", line):
            found.append((opened.group(1), None, None))
        elif expected := re.match(r"(.*)// finds: (.*)$", line):
            on_code = expected.group(1).strip() != ""
            found[-1] = (found[-1][0], expected.group(2), number if on_code else None)
    return found


def run(name: str) -> np.ndarray:
    data = np.arange(64, dtype=np.float32)
    library().register([("data", data.ctypes.data, data.nbytes, True, True)])
    library().call("probe", name.encode(), ctypes.c_void_p(data.ctypes.data))
    return data


FAULTS = [probe for probe in probes() if probe[1] is not None]


@pytest.mark.parametrize(("name", "words", "line"), FAULTS, ids=[probe[0] for probe in FAULTS])
def test_a_fault_is_found_and_its_line_named(name: str, words: str, line: int | None) -> None:
    with pytest.raises(HostCudaError) as caught:
        run(name)
    assert words in str(caught.value)
    if line is not None:
        assert f"probes.cu:{line}" in str(caught.value)


ROW = np.arange(64, dtype=np.float32)
SOUND = {
    "block_sum": np.full(64, ROW.sum()),
    "reversal_through_dynamic_memory": ROW[::-1],
    "warp_sync_orders_a_warp": np.arange(64) ^ 1,
    "votes_and_shuffles": np.repeat([0 + 11 + 31, 32 + 11 + 63], 32),
    "atomics": np.full(64, 64),
    "asynchronous_copy": ROW,
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_kernel_runs(name: str) -> None:
    np.testing.assert_array_equal(run(name), SOUND[name])


def test_every_probe_is_either_sound_or_faulty() -> None:
    assert set(SOUND) == {name for name, words, _ in probes() if words is None}


def test_a_launch_after_a_fault_is_unharmed() -> None:
    with pytest.raises(HostCudaError):
        run("barrier_in_a_branch")
    np.testing.assert_array_equal(run("block_sum"), SOUND["block_sum"])


@pytest.mark.slow
def test_the_kernels_are_clean_under_the_address_sanitizer():
    """Each thread's own arrays too; in a process of its own, since the sanitizer must be loaded first."""
    libraries = [
        subprocess.run(
            [compiler(), f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    settings = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", ADDRESS_VARIABLE: "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not last_byte"]
    command.append(str(HERE / "test_tiled_kernels.py"))
    run = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
