"""A training step starts work and never asks for a result."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))

import small_run

from groupvit_fast.training import objective, trainer

ASKING = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2",
    "unique_dim", "unique_consecutive",
}  # fmt: skip
"""Operators whose result, or whose result's shape, the host has to wait for."""


class Watch(TorchDispatchMode):
    """Notes every operator that makes the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        masks = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (
                arguments[1] if len(arguments) > 1 and isinstance(arguments[1], (list, tuple)) else []
            )
        )
        if name in ASKING or masks:
            self.seen.append(name)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("question", [
    lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x[x > 0], lambda x: x.unique(),
    lambda x: x.nonzero(),
])  # fmt: skip
def test_the_watch_sees_a_question(question):
    with Watch() as watch:
        question(torch.arange(3.0))
    assert watch.seen


@pytest.mark.parametrize(
    "options",
    [{}, {"siglip": True}, {"grad_checkpointing": ["all"]}, {"multi_label": 0}, {"accum_freq": 2}],
    ids=["default", "siglip", "checkpointing", "captions", "accumulated"],
)
def test_no_operator_of_a_step_is_a_question(tmp_path, monkeypatch, options):
    """What is read of a batch in host memory (`packed`) is asked before; nothing else is."""
    config = replace(small_run.CONFIG, **options)
    settings = replace(small_run.MODEL, logit_bias_init=-10.0 if config.siglip else None)
    run = small_run.trainer(tmp_path, config, settings=settings)
    batch = next(iter(run.loader))
    run.train_step(batch)
    ready = {}
    plain = objective.packed

    def packed(texts, device, dtype):
        with torch.utils._python_dispatch._disable_current_modes():
            ready["texts"] = plain(texts, device, dtype)
        return ready["texts"]

    monkeypatch.setattr(trainer, "packed", packed)
    with Watch() as watch:
        run.train_step(batch)
    assert ready
    assert watch.seen == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can be waited for")
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_no_step_on_a_gpu_waits(tmp_path, dtype):
    run = small_run.trainer(tmp_path, small_run.CONFIG, device="cuda", dtype=dtype)
    batches = iter(run.loader)
    for _ in range(2):
        batch = next(batches)
        batch.images = batch.images.cuda()
        torch.cuda.set_sync_debug_mode("error" if run.step else "default")
        try:
            run.train_step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
