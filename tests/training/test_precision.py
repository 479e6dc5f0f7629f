"""What --amp means where."""

from __future__ import annotations

import pytest
import torch

from groupvit_fast.console import UserError
from groupvit_fast.training import precision
from groupvit_fast.training.precision import autocast, choose_dtype, cpu_bf16_speedup


def cpu(monkeypatch, *, unit, speedup):
    flags = {True: {"amx_bf16"}, False: set()}.get(unit, {unit})
    monkeypatch.setattr(precision, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(precision, "cpu_bf16_speedup", lambda width: speedup)


def test_without_amp_it_is_float32():
    assert choose_dtype(False, "bf16", "cpu", 64) == ("float32", None)
    assert choose_dtype(True, "float32", "cuda", 64) == ("float32", None)


def test_a_cpu_without_fast_bf16_says_so_in_one_line(monkeypatch):
    cpu(monkeypatch, unit=False, speedup=9.0)
    dtype, remark = choose_dtype(True, "auto", "cpu", 64)
    assert dtype == "float32"
    assert "--amp-dtype bf16" in remark
    assert "\n" not in remark
    cpu(monkeypatch, unit=True, speedup=0.8)
    assert choose_dtype(True, "auto", "cpu", 64)[0] == "float32"
    assert "0.8x" in choose_dtype(True, "auto", "cpu", 64)[1]


def test_a_cpu_with_fast_bf16_uses_it(monkeypatch):
    cpu(monkeypatch, unit=True, speedup=3.0)
    assert choose_dtype(True, "auto", "cpu", 64) == ("bf16", None)


@pytest.mark.parametrize(
    ("width", "speedup", "dtype"), [(384, 1.6, "bf16"), (384, 0.9, "float32"), (64, 1.6, "float32")]
)
def test_avx512_bf16_counts_for_wide_models_where_it_is_measured_faster(monkeypatch, width, speedup, dtype):
    cpu(monkeypatch, unit="avx512_bf16", speedup=speedup)
    assert choose_dtype(True, "auto", "cpu", width)[0] == dtype


def test_bf16_can_be_insisted_on(monkeypatch):
    cpu(monkeypatch, unit=False, speedup=0.1)
    assert choose_dtype(True, "bf16", "cpu", 64) == ("bf16", None)


def test_fp16_needs_a_gpu():
    with pytest.raises(UserError, match="needs a GPU"):
        choose_dtype(True, "fp16", "cpu", 64)
    assert choose_dtype(True, "fp16", "cuda", 64) == ("fp16", None)


def test_the_measurement_is_short_and_leaves_the_random_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert 0.01 < cpu_bf16_speedup(32) < 100
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast_covers_products_only_when_asked():
    a = torch.ones(2, 2)
    with autocast("cpu", torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
    with autocast("cpu", torch.float32):
        assert (a @ a).dtype == torch.float32
