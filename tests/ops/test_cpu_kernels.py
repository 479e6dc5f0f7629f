"""The compiled CPU kernels: the same bits on any number of threads, every instruction set in the budget."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from groupvit_fast import ops
from groupvit_fast.ops import library

pytestmark = pytest.mark.skipif(not library.HAS_CPU, reason="nothing was compiled")
NOISE = torch.tensor([9, 1])


def all_results(query, key, bias, heads):
    """Every tensor that the operators produce, backward included."""
    leaves = [t.detach().requires_grad_() for t in (query, key, bias)]
    results = []
    for hard in (True, False):
        assigned = ops.gumbel_assign(
            leaves[0], leaves[1], leaves[1], bias=leaves[2], hard=hard, noise_key=NOISE
        )
        results += [*assigned, *torch.autograd.grad(assigned.output.square().sum(), leaves)]
    split = [t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (leaves[0], leaves[1], leaves[1])]
    output = ops.group_attention(*split)
    return [*results, output, *torch.autograd.grad(output.square().sum(), leaves[:2])]


def problem(batch=5, groups=70, tokens=150, channels=64):
    return (
        torch.randn(batch, groups, channels),
        torch.randn(batch, tokens, channels),
        torch.randn(batch, groups),
    )


def test_the_number_of_threads_does_not_matter():
    tensors, before = problem(), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(all_results(*tensors, heads=4))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], result, strict=True))


def test_a_sample_does_not_depend_on_its_batch():
    """Without noise, which is numbered through the whole batch."""
    query, key, bias = problem()
    whole = ops.gumbel_assign(query, key, key, bias=bias)
    for i in range(len(query)):
        alone = ops.gumbel_assign(query[i : i + 1], key[i : i + 1], key[i : i + 1], bias=bias[i : i + 1])
        assert all(torch.equal(one[i : i + 1], other) for one, other in zip(whole, alone, strict=True))


def flags_of_memory(address: int) -> list[str]:
    """What the system was told about the mapping that holds `address`: VmFlags of /proc/self/smaps."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first:
            begin, end = (int(number, 16) for number in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    return []


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists() or not Path("/proc/self/smaps").exists(),
    reason="no huge pages here",
)
@pytest.mark.parametrize("name", ["group_attention", "gumbel_assign"])
def test_large_results_ask_for_huge_pages(name):
    key = torch.randn(1, 1 << 17, 64, requires_grad=True)  # 32 MiB
    query = key.detach()[:, :1]
    if name == "group_attention":
        output = ops.group_attention(query[None], key[None], key.detach()[None])
    else:
        output = ops.gumbel_assign(query, key, key).output
    (gradient,) = torch.autograd.grad(output.sum(), key)
    assert "hg" in flags_of_memory(gradient.data_ptr() + gradient.nbytes // 2)


@pytest.mark.parametrize("level", ["plain", "avx2", "avx512"])
def test_every_instruction_set_passes_the_operator_tests(level):
    """The level is chosen once per process, so the suite is run again in another one."""
    tests = [
        str(Path(__file__).with_name(name)) for name in ("test_gumbel_assign.py", "test_group_attention.py")
    ]
    environment = os.environ | {"GROUPVIT_CPU": level, "GROUPVIT_TEST_HOST_CUDA": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "cpu or any_problem", *tests]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stdout[-3000:]
    assert " passed" in finished.stdout
