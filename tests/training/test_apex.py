"""NVIDIA apex told from the other package of its name, and its optimisers behind the guard.

What is imported here is written to a folder on `sys.path`: a stand-in with the interface of NVIDIA's package,
or a package that happens to have its name.
"""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from groupvit_fast.console import UserError
from groupvit_fast.training import apex, parallel
from groupvit_fast.training.config import TrainConfig
from groupvit_fast.training.optim import GuardedAdamW

STAND_IN = """
import torch

class FusedAdam(torch.optim.AdamW):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0, amsgrad=False, set_grad_none=True):
        assert adam_w_mode
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=False)

class FusedLAMB(FusedAdam):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01,
                 amsgrad=False, adam_w_mode=True, grad_averaging=True, set_grad_none=True, max_grad_norm=1.0,
                 use_nvlamb=False):
        assert max_grad_norm == 0.0
        super().__init__(params, lr, betas=betas, eps=eps)
"""
NORM = """
import torch

class FusedLayerNorm(torch.nn.Module):
    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, memory_efficient=False):
        super().__init__()
        self.shape, self.eps = normalized_shape, eps
        self.weight = torch.nn.Parameter(torch.empty(normalized_shape))
        self.bias = torch.nn.Parameter(torch.empty(normalized_shape))

    def forward(self, x):
        return torch.nn.functional.layer_norm(x, self.shape, self.weight, self.bias, self.eps)
"""
CONFIG = TrainConfig(clip_grad=0.5, weight_decay=0.1)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A function: make a package `apex` of these modules importable."""

    def write(**modules):
        for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
            monkeypatch.delitem(sys.modules, name)
        folder = tmp_path / "apex"
        folder.mkdir()
        (folder / "__init__.py").write_text("")
        for name, source in modules.items():
            (folder / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)

    yield write
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(3, 4), nn.LayerNorm(4)

    def forward(self, x):
        return (self.norm(self.linear(x)) * torch.arange(4)).square().mean()


def step(model, optimizer, spoil=1.0):
    optimizer.start_step()
    return optimizer.step(model(torch.linspace(-1, 1, 15).view(5, 3)) * spoil, 1e-2)


@pytest.mark.parametrize("name", ["apex-adam", "apex-lamb"])
def test_clipped_steps_equal_those_of_the_plain_optimiser(install, name):
    install(optimizers=STAND_IN)
    one, other = Model(), Model()
    fused, plain = GuardedAdamW(one, replace(CONFIG, optimizer=name)), GuardedAdamW(other, CONFIG)
    assert fused.adamw.inner.__class__.__module__ == "apex.optimizers"
    for _ in range(3):
        found, wanted = step(one, fused), step(other, plain)
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("when", [0, 1])
def test_a_bad_step_changes_no_weight_and_no_moment(install, when):
    install(optimizers=STAND_IN)
    model = Model()
    optimizer = GuardedAdamW(model, replace(CONFIG, optimizer="apex-adam"))
    for _ in range(when):
        step(model, optimizer)
    before = [value.clone() for value in model.parameters()]
    moments = [v["exp_avg"].clone() for v in optimizer.adamw.state.values()]
    _, bad = step(model, optimizer, math.nan)
    assert bad == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for number, state in enumerate(optimizer.adamw.state.values()):
        assert torch.equal(
            state["exp_avg"], moments[number] if moments else torch.zeros_like(state["exp_avg"])
        )


def test_state_survives_saving(install):
    install(optimizers=STAND_IN)
    config = replace(CONFIG, optimizer="apex-adam")
    one, other = Model(), Model()
    first, second = GuardedAdamW(one, config), GuardedAdamW(other, config)
    step(one, first)
    other.load_state_dict(one.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    step(one, first)
    step(other, second)
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_the_other_apex_is_told_apart(install):
    install(session="class Session: ...")
    with pytest.raises(UserError, match=r"another project: pip uninstall apex, then build it from https"):
        GuardedAdamW(Model(), replace(CONFIG, optimizer="apex-adam"))


def test_none_at_all(monkeypatch):
    monkeypatch.setattr(apex.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "apex.optimizers", None)
    with pytest.raises(UserError, match="which is not installed"):
        GuardedAdamW(Model(), replace(CONFIG, optimizer="apex-lamb"))


def test_one_that_does_not_load_says_why(install):
    install(optimizers="import amp_C")
    with pytest.raises(UserError, match=r"does not load .*amp_C"):
        GuardedAdamW(Model(), replace(CONFIG, optimizer="apex-adam"))


def test_layer_norms_become_fused_with_the_same_parameters(install):
    install(optimizers=STAND_IN, normalization=NORM)
    model, plain = Model(), Model()
    parallel.prepare_norms(model, replace(CONFIG, optimizer="apex-adam"))
    assert type(model.norm).__name__ == "FusedLayerNorm"
    assert list(model.state_dict()) == list(plain.state_dict())
    x = torch.linspace(-1, 1, 15).view(5, 3)
    torch.testing.assert_close(model(x), plain(x))
