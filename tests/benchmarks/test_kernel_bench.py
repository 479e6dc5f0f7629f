"""The kernel benchmark: a table, a JSON file, and no number for a kernel that is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from groupvit_fast import ops
from groupvit_fast.console import UserError, run_command
from groupvit_fast.ops import library

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import block_cases
import cases
import eager
import kernel_bench
import sdpa
import stopwatch
import sweep

pytestmark = pytest.mark.skipif(not library.HAS_CPU, reason="nothing was compiled")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    def small_cases(device, dtype, *, full):
        return [
            lambda: cases.attention_case(2, 2, 8, 30, 16, device, dtype),
            lambda: cases.assign_case(2, 8, 30, 32, device, dtype),
            lambda: cases.upsample_case(2, 4, 7, 20, device, dtype),
            lambda: cases.decode_case(1, 5, (7, 7), (20, 20), device, dtype),
        ]

    def small_blocks(device, dtype):
        makers = (block_cases.assign_block_case, block_cases.grouping_block_case)
        return [lambda make=make: make(2, 8, 30, 32, device, dtype) for make in makers]

    monkeypatch.setattr(kernel_bench, "official_cases", small_cases)
    monkeypatch.setattr(kernel_bench, "official_blocks", small_blocks)
    monkeypatch.setattr(stopwatch, "copy_bandwidth", lambda device, clock: 1e10)
    monkeypatch.setattr(stopwatch, "keep_released_memory", lambda: True)  # of the whole process


def test_every_operator_gets_a_row_per_pass(tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert run_command(kernel_bench.main, ["--device", "cpu", "--seconds", "0", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    own = [row for row in rows if row["contender"] == "ours"]
    both = ("forward", "forward+backward")
    wanted = [f"{name} {p}" for name in ("group_attention", "gumbel_assign", "upsample_masks") for p in both]
    wanted.append("decode_masks forward")
    wanted += [f"{name} {p}" for name in ("assign_block", "grouping_block") for p in both]
    assert [row["name"] for row in own] == wanted
    table = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in table[-len(own) :]}) == 1  # aligned
    eager = {row["name"]: row for row in rows if row["contender"] == "eager"}
    for row in own:
        assert row["p10_s"] <= row["median_s"] <= row["p90_s"]
        assert row["ratio"] == 1
        assert eager[row["name"]]["ratio"] == pytest.approx(eager[row["name"]]["median_s"] / row["median_s"])
        assert row["bytes"] > 0
        assert eager[row["name"]]["peak_bytes"] > 0


def test_a_wrong_kernel_is_an_error_not_a_number(monkeypatch, tmp_path, capsys):
    path = tmp_path / "bench.json"
    right = ops.group_attention
    monkeypatch.setattr(ops, "group_attention", lambda *tensors: right(*tensors) * 1.001)
    arguments = ["--device", "cpu", "--seconds", "0", "--only", "attention", "--json", str(path)]
    assert run_command(kernel_bench.main, arguments) == 1
    assert "error: group_attention output: error" in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.parametrize("forgotten", ["key", "value"])
def test_a_block_that_forgets_a_bias_gets_no_time(forgotten, monkeypatch):
    case = block_cases.assign_block_case(2, 8, 30, 32, "cpu", torch.float32)
    case.check()
    plain = eager.assign_block

    def without(block, *tensors):
        layer = getattr(block, forgotten)
        layers = SimpleNamespace(**block._modules, tau=block.tau, eps=block.eps)
        setattr(layers, forgotten, SimpleNamespace(weight=layer.weight, bias=0 * layer.bias))
        return plain(layers, *tensors)

    monkeypatch.setattr(eager, "assign_block", without)
    with pytest.raises(UserError, match="assign_block"):
        block_cases.assign_block_case(2, 8, 30, 32, "cpu", torch.float32).check()


def test_bytes_are_those_of_the_tensors():
    case = cases.assign_case(2, 8, 30, 32, "cpu", torch.float32)
    tensors = 2 * 8 * 32 + 2 * 30 * 32  # query, key
    assert case.forward_bytes() == 4 * (tensors + 2 * 8 * 32 + 2 * 8) + 8 * 2 * 30


def test_peak_memory_counts_what_lives_at_once():
    values = torch.zeros(1 << 18)
    peak = stopwatch.peak_memory(lambda: (values + 1) * 2, "cpu")
    assert peak == pytest.approx(2 * values.nbytes, rel=0.01)


def test_what_the_backward_keeps_is_counted_once_and_without_inputs():
    values = torch.rand(1 << 10, requires_grad=True)
    assert stopwatch.saved_bytes(lambda: values * values, [values]) == 0
    exponential = values.nbytes  # the result of exp, kept by it and by the product
    assert stopwatch.saved_bytes(lambda: values.exp() * values, [values]) == exponential
    assert stopwatch.saved_bytes(lambda: values.exp(), [values]) == 0  # its result


def test_waiting_of_the_host_is_counted():
    case = cases.assign_case(2, 8, 30, 32, "cpu", torch.float32)
    assert stopwatch.host_reads(case.candidates["eager"]) > 0
    assert stopwatch.host_reads(case.with_backward(case.candidates["ours"])) == 0
    assert stopwatch.host_reads(lambda: torch.ones(3).nonzero().sum().item()) == 2


def test_every_back_end_of_attention_is_a_candidate():
    names = list(cases.attention_case(2, 2, 8, 30, 16, "cpu", torch.float32).candidates)
    assert names == ["eager", "SDPA", "SDPA math", "ours"]


def test_a_back_end_that_refuses_is_left_out(monkeypatch):
    """The flash kernel of GPUs does not run on a CPU's tensors of three dimensions."""
    leaves = [torch.randn(4, 8, 16, requires_grad=True) for _ in range(3)]
    named = {"flash": sdpa.SDPBackend.FLASH_ATTENTION, "cudnn": sdpa.SDPBackend.CUDNN_ATTENTION}
    monkeypatch.setattr(sdpa, "NAMED", {"cpu": named | {"math": sdpa.SDPBackend.MATH}})
    assert list(sdpa.candidates(leaves)) == ["SDPA", "SDPA math"]


def test_what_was_timed_before_an_end_is_kept(monkeypatch, tmp_path):
    path = tmp_path / "bench.json"
    monkeypatch.setattr(ops, "upsample_masks", lambda maps, size: maps.new_zeros(*maps.shape[:2], *size))
    assert run_command(kernel_bench.main, ["--device", "cpu", "--seconds", "0", "--json", str(path)]) == 1
    names = {row["name"].split()[0] for row in json.loads(path.read_text())["rows"]}
    assert names == {"group_attention", "gumbel_assign"}


@pytest.mark.parametrize(("eager", "status"), [(2.0, 0), (0.5, sweep.MISSED)])
def test_the_sweep_tells_where_an_operator_loses(eager, status, monkeypatch, tmp_path, capsys):
    sizes = {"GROUPS": (2, 5), "TOKENS": (3,), "CHANNELS": (32,), "WORK": 1 << 10}
    for name, value in sizes.items():
        monkeypatch.setattr(sweep, name, value)

    def timed(candidates, device, **settings):
        milliseconds = {name: eager if name == "eager" else 1.0 for name in candidates}
        return {name: stopwatch.Timing(ms, ms, ms, 1) for name, ms in milliseconds.items()}

    monkeypatch.setattr(stopwatch, "interleaved", timed)
    path = tmp_path / "sweep.json"
    assert run_command(kernel_bench.main, ["--device", "cpu", "--sweep", "--json", str(path)]) == status
    rows = [row for row in json.loads(path.read_text())["rows"] if row["contender"] == "eager"]
    assert [row["name"].partition(" ")[0] for row in rows] == (
        ["gumbel_assign"] * 2 + ["group_attention"] * 2
    ) * 2
    assert all(row["ratio"] == eager for row in rows)
    table = capsys.readouterr().out
    assert (
        table.count(f"4 timings, median gain {eager:.2f}, {4 * bool(status)} slower than plain PyTorch") == 2
    )
