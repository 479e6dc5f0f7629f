"""Parameter groups, schedule, and the guard: a bad step changes nothing at all."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from groupvit_fast.training.config import TrainConfig
from groupvit_fast.training.optim import FIRST_LOSS_SCALE, GuardedAdamW, Schedule, parameter_groups
from groupvit_fast.training.recipes import groupvit_gcc_yfcc

CONFIG = TrainConfig(clip_grad=0.5, weight_decay=0.1)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 4, bias=False)  # batch norm would leave a bias rounding noise for gradient
        self.norm = nn.BatchNorm1d(4)
        self.group_tokens = nn.Parameter(torch.randn(1, 2, 4))
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return (self.norm(self.linear(x))[:, None] * self.group_tokens).square().mean() * self.logit_scale


def bits(model, optimizer=None):
    """Everything a step may change, as bytes."""
    values = list(model.state_dict().values())
    if optimizer:
        values += [value for state in optimizer.adamw.state.values() for value in state.values()]
    return [value.detach().numpy().tobytes() for value in values]


def step(model, optimizer, *, spoil=None):
    optimizer.start_step()
    loss = model(torch.linspace(-1, 1, 15).view(5, 3))
    if spoil == "loss":
        loss = loss * math.nan
    elif spoil == "infinite loss":
        loss = loss + math.inf
    elif spoil == "gradient":
        handle = model.linear.weight.register_hook(
            lambda gradient: gradient.index_fill(0, torch.tensor([1]), math.nan)
        )
    result = optimizer.step(loss, 1e-2)
    if spoil == "gradient":
        handle.remove()
    return result


def test_only_vectors_and_biases_are_free_of_decay():
    model = Model()
    decayed, free = parameter_groups(model, 0.1)
    assert {id(p) for p in decayed["params"]} == {
        id(model.linear.weight),
        id(model.group_tokens),
        id(model.logit_scale),
    }
    assert decayed["weight_decay"] == 0.1
    assert free["weight_decay"] == 0.0
    assert len(free["params"]) == 2


def test_schedule_warms_up_then_follows_the_cosine():
    schedule = Schedule(steps=100, warmup_steps=10, peak=1.0, minimum=0.1, warmup_start=0.01)
    assert schedule.rate(0) == 0.01
    assert schedule.rate(5) == pytest.approx(0.01 + 0.99 / 2)
    assert schedule.rate(50) == pytest.approx(0.55)
    assert schedule.rate(100) == schedule.rate(1000) == pytest.approx(0.1)


def test_official_rates_scale_with_the_global_batch():
    schedule = Schedule.of(groupvit_gcc_yfcc(), steps=3000, steps_per_epoch=100, world_size=8)
    assert schedule.peak == pytest.approx(1.6e-3 * 256 * 8 / 4096)
    assert schedule.minimum == pytest.approx(2e-5)
    assert schedule.warmup_steps == 200
    fixed = replace(groupvit_gcc_yfcc(), lr_batch=None, warmup_steps=7)
    assert Schedule.of(fixed, steps=9, steps_per_epoch=3, world_size=2) == Schedule(9, 7, 1.6e-3, 4e-5, 4e-6)


def test_good_steps_equal_clipped_adamw():
    model, plain = Model(), Model()
    guarded = GuardedAdamW(model, CONFIG)
    reference = torch.optim.AdamW(parameter_groups(plain, 0.1), lr=1e-2)
    for _ in range(3):
        norm, bad = step(model, guarded)
        reference.zero_grad()
        plain(torch.linspace(-1, 1, 15).view(5, 3)).backward()
        expected = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        reference.step()
        assert norm == pytest.approx(expected.item())
        assert norm > 0.5
        assert bad == 0
    torch.testing.assert_close(dict(model.state_dict()), dict(plain.state_dict()))


@pytest.mark.parametrize("spoil", ["loss", "infinite loss", "gradient"])
def test_a_bad_step_leaves_every_bit_alone(spoil):
    model = Model()
    optimizer = GuardedAdamW(model, CONFIG)
    step(model, optimizer)
    before = bits(model, optimizer)
    _, bad = step(model, optimizer, spoil=spoil)
    assert bad == 1
    assert bits(model, optimizer) == before
    step(model, optimizer)
    assert bits(model, optimizer) != before


def test_training_goes_on_as_if_the_bad_step_had_not_been():
    one, other = Model(), Model()
    skipping, plain = GuardedAdamW(one, CONFIG), GuardedAdamW(other, CONFIG)
    for spoil in (None, "gradient", None, "loss", None):
        step(one, skipping, spoil=spoil)
    for _ in range(3):
        step(other, plain)
    assert bits(one, skipping) == bits(other, plain)


def test_bad_steps_are_counted():
    model = Model()
    optimizer = GuardedAdamW(model, CONFIG)
    for spoil in (None, "loss", "loss", None, "gradient"):
        step(model, optimizer, spoil=spoil)
    assert optimizer.bad_steps == 3
    assert optimizer.bad_in_a_row == 1


def test_float16_scale_halves_on_overflow_and_is_no_alarm():
    model = Model()
    optimizer = GuardedAdamW(model, CONFIG, loss_scaling=True)
    before = bits(model)
    _, bad = step(model, optimizer, spoil="gradient")
    assert bad == 1
    assert bits(model) == before
    assert optimizer.loss_scale == FIRST_LOSS_SCALE / 2
    assert optimizer.bad_in_a_row == 0
    norm, _ = step(model, optimizer)
    plain, reference = Model(), GuardedAdamW(Model(), CONFIG)
    reference = GuardedAdamW(plain, CONFIG)
    expected, _ = step(plain, reference)
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(dict(model.state_dict()), dict(plain.state_dict()))


def test_state_continues_exactly():
    one = Model()
    first = GuardedAdamW(one, CONFIG)
    for spoil in (None, "loss"):
        step(one, first, spoil=spoil)
    other = Model()
    other.load_state_dict(one.state_dict())
    second = GuardedAdamW(other, CONFIG)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    step(one, first, spoil="loss")
    step(other, second, spoil="loss")
    step(one, first)
    step(other, second)
    assert bits(one, first) == bits(other, second)
    assert second.bad_steps == 2
