"""The exponential moving average of the weights, a model of its own."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from groupvit_fast.training.sharding import own


class WeightAverage:
    """`model` holds average = decay * average + (1 - decay) * weights; running statistics are those of today.

    In the first steps the decay is smaller, (1 + step) / (10 + step), so that the average does not stay at
    the initial weights. A step that was skipped (`bad` 1) does not move it. The host is never asked.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, bad: Tensor, step: int) -> None:
        """Move towards `model` after its update of step `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        average, weights = ([own(one) for one in each.parameters()] for each in (self.model, model))
        difference = torch._foreach_sub(weights, average)
        torch._foreach_mul_(difference, (1 - decay) * (1 - bad))
        torch._foreach_add_(average, difference)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
