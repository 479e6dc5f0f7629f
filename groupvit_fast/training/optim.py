"""AdamW with the published parameter groups, the learning rate, and the guard against bad numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from groupvit_fast.console import UserError
from groupvit_fast.training import sharding
from groupvit_fast.training.apex import ApexOptimizer
from groupvit_fast.training.config import TrainConfig
from groupvit_fast.training.distributed import sum_over_processes

FIRST_LOSS_SCALE = 2.0**16
LOSS_SCALE_PATIENCE = 2000
"""Good steps before the loss scale of float16 doubles."""


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Decay everything but 1-D parameters and biases.

    So group tokens, position embedding and the 0-dim temperatures do decay, as in the published training.
    The rate of a layer is `layer_decay` times that of the layer above (`rate_factor` of its group).
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    layers = layers_above(model) if layer_decay != 1 else {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            free, above = parameter.ndim == 1 or name.endswith("bias"), layers.get(name, 0)
            group = {"params": [], "weight_decay": 0.0 if free else weight_decay}
            group["rate_factor"] = layer_decay**above
            groups.setdefault((above, free), group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def layers_above(model: nn.Module) -> dict[str, int]:
    """For each parameter of a GroupViT, how many layers of its encoder come after it (embeddings: all)."""
    depths, texts = model.config.image.depths, model.config.text.layers
    above = {}
    for name, _ in model.named_parameters():
        parts, last = name.split("."), 0
        if name.startswith("image_encoder.stages."):
            stage = int(parts[2])
            block = int(parts[4]) if parts[3] == "blocks" else depths[stage] - 1
            last = sum(depths) - sum(depths[:stage]) - block
        elif name.startswith("text_encoder.blocks."):
            last = texts - int(parts[2])
        elif name.startswith("image_encoder.patch_embedding."):
            last = sum(depths) + 1
        elif name.startswith(("text_encoder.token_embedding.", "text_encoder.position")):
            last = texts + 1
        above[name] = last
    return above


def freeze(model: nn.Module, prefixes: list[str]) -> None:
    """Keep the parameters whose names begin with one of `prefixes` as they are."""
    for prefix in prefixes:
        chosen = [parameter for name, parameter in model.named_parameters() if name.startswith(prefix)]
        if not chosen:
            parts = ", ".join(name for name, _ in model.named_children())
            raise UserError(f"--freeze {prefix}: no parameter has a name that begins so (parts: {parts})")
        for parameter in chosen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("--freeze leaves nothing to train")


def number_of_steps(config: TrainConfig, steps_per_epoch: int, world_size: int) -> int:
    """The length of a run, however it was given: steps, pairs or epochs (one, if nothing was)."""
    if config.train_samples:
        return math.ceil(config.train_samples / (config.batch_size * config.accum_freq * world_size))
    return config.steps or max(1, round((config.epochs or 1) * steps_per_epoch))


@dataclass(frozen=True)
class Schedule:
    """Learning rate of each step: linear warm-up, then a cosine.

    As in the published training, the cosine counts from step 0, so that the warm-up ends slightly below
    its peak.
    """

    steps: int
    warmup_steps: int
    peak: float
    minimum: float
    warmup_start: float

    @classmethod
    def of(cls, config: TrainConfig, *, steps: int, steps_per_epoch: int, world_size: int) -> Schedule:
        """The schedule of a run; with `lr_batch`, the rates grow with the global batch."""
        factor = (
            config.batch_size * config.accum_freq * world_size / config.lr_batch if config.lr_batch else 1.0
        )
        warmup = config.warmup_steps
        if warmup is None:
            warmup = round(config.warmup_epochs * steps_per_epoch)
        return cls(steps, warmup, config.lr * factor, config.min_lr * factor, config.warmup_lr * factor)

    def rate(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.warmup_start + (self.peak - self.warmup_start) * step / self.warmup_steps
        cosine = math.cos(math.pi * min(step / self.steps, 1.0))
        return self.minimum + (self.peak - self.minimum) * (1 + cosine) / 2


class GuardedAdamW:
    """Backward pass, clipping and AdamW, which a loss or gradient that is not finite turns into nothing.

    Whether a step is bad stays a number on the device: fused AdamW takes it as `found_inf` and does not
    touch weights or moments, and running statistics (batch norm) are put back. The host is never asked.
    Clipping, and the loss scale of float16, are folded into the same kernel as `grad_scale`.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, *, loss_scaling: bool = False) -> None:
        groups = parameter_groups(model, config.weight_decay, config.layer_decay)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        for group in groups:
            group["params"] = [sharding.trainable(parameter) for parameter in group["params"]]
        self.own = [parameter for group in groups for parameter in group["params"]]
        settings = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
        if config.optimizer == "adamw":
            self.adamw = torch.optim.AdamW(groups, fused=True, **settings)
        else:
            self.adamw = ApexOptimizer(config.optimizer, groups, **settings)
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
        self.statistics = [buffer for norm in norms for buffer in norm.buffers()]
        self.clip_grad = config.clip_grad
        self.loss_scaling = loss_scaling
        zero = torch.zeros((), device=self.parameters[0].device)
        self.loss_scale = zero + (FIRST_LOSS_SCALE if loss_scaling else 1.0)
        self.good_steps, self.bad_steps, self.bad_in_a_row = zero.clone(), zero.clone(), zero.clone()
        self._before: list[Tensor] = []

    def start_step(self) -> None:
        """Call before the forward pass.

        The last gradients go, so that they do not stand beside the activations that this pass makes, and the
        running statistics that it changes are remembered.
        """
        self.zero_grad()
        self._before = [buffer.clone() for buffer in self.statistics]

    def step(self, loss: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """Back-propagate and update; returns the gradient norm and whether the step was bad (0 or 1)."""
        self.backward(loss)
        return self.update(loss, rate)

    def zero_grad(self) -> None:
        for parameter in (*self.parameters, *self.own):
            parameter.grad = None

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, times the loss scale that `update` divides by."""
        self.scaled(loss).backward()

    def scaled(self, loss: Tensor) -> Tensor:
        return loss * self.loss_scale if self.loss_scaling else loss

    def update(self, loss: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """Update with the gradients that are there; returns what `step` does. `loss` is only looked at."""
        for parameter, mine in zip(self.parameters, self.own, strict=True):
            mine.grad = None if parameter.grad is None else sharding.own(parameter.grad)
        live = [parameter for parameter in self.parameters if parameter.grad is not None]
        gradients = [mine.grad for mine in self.own if mine.grad is not None]
        norm = sharding.total_norm(gradients, live) / self.loss_scale
        bad = 1.0 - (norm.isfinite() & loss.detach().isfinite()).float()
        bad = sum_over_processes(bad).clamp(max=1.0)
        divisor = self.loss_scale
        if self.clip_grad:
            divisor = divisor * (norm / self.clip_grad).clamp(min=1.0)
        for group in self.adamw.param_groups:
            group["lr"] = rate * group["rate_factor"]
        # the fused kernel wants float32 here whatever the weights are
        self.adamw.grad_scale, self.adamw.found_inf = divisor.float(), bad
        self.adamw.step()
        self._restore_statistics(bad)
        self._count(bad, loss.detach())
        return norm, bad

    def _restore_statistics(self, bad: Tensor) -> None:
        for buffer, before in zip(self.statistics, self._before, strict=True):
            buffer.copy_(torch.where(bad > 0, before, buffer))

    def _count(self, bad: Tensor, loss: Tensor) -> None:
        """Count bad steps; the loss scale of float16 halves after a bad one and doubles after many good."""
        alarming = bad
        if self.loss_scaling:
            # an overflow that a smaller scale cures is no reason to stop
            alarming = bad * ((self.loss_scale <= 1) | ~loss.isfinite()).float()
            self.good_steps = (self.good_steps + 1) * (1 - bad)
            grow = (self.good_steps >= LOSS_SCALE_PATIENCE).float()
            self.loss_scale = self.loss_scale * (1 + grow) * (1 - 0.5 * bad)
            self.good_steps = self.good_steps * (1 - grow)
        self.bad_steps = self.bad_steps + bad
        self.bad_in_a_row = (self.bad_in_a_row + alarming) * alarming

    def state_dict(self) -> dict[str, Any]:
        counters = {name: getattr(self, name) for name in self._counters}
        adamw = self._with_moments(self.adamw.state_dict(), sharding.whole)
        return {"adamw": adamw, **counters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adamw.load_state_dict(
            self._with_moments(state["adamw"], lambda value, like: sharding.own(sharding.cut(value, like)))
        )
        for name in self._counters:
            setattr(self, name, state[name].to(self.loss_scale.device))

    def _with_moments(
        self, state: dict[str, Any], change: Callable[[Tensor, Tensor], Tensor]
    ) -> dict[str, Any]:
        """`state` of the optimiser with `change(moment, parameter)` in place of each moment."""
        moments = {
            number: {
                name: change(value, self.parameters[number]) if name != "step" else value
                for name, value in values.items()
            }
            for number, values in state["state"].items()
        }
        return {**state, "state": moments}

    _counters = ("loss_scale", "good_steps", "bad_steps", "bad_in_a_row")
