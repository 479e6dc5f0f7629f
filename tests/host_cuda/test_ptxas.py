"""Every CUDA source compiles for every target without a register spill, as far as nvcc is here to say so."""

from __future__ import annotations

import pytest
from ptxas_table import ARCHITECTURES, NVCC, OWN_FLAGS, SOURCES, Kernel, compiled_kernels, kernels_in

REPORT = """ptxas info    : Compiling entry function '_Z6kernelPf' for 'sm_80'
ptxas info    : Function properties for _Z6kernelPf
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size, 512 bytes smem
"""


def test_a_report_is_read():
    assert kernels_in(REPORT) == [Kernel("_Z6kernelPf", 255, 512, 16, 20)]


def test_flags_are_those_of_the_build():
    assert OWN_FLAGS == {"mask_upsample.cu": "--fmad=false"}


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_no_kernel_spills(source, architecture):
    kernels = compiled_kernels(source, architecture)
    assert kernels
    assert not [kernel for kernel in kernels if kernel.spilled_bytes or kernel.stack_bytes]
