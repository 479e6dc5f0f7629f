"""What one training step of the tiny recipe asks of PyTorch: operators, allocations, bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import stopwatch
import torch
import train_cases
from torch.utils._python_dispatch import TorchDispatchMode

from groupvit_fast.model import create_model
from groupvit_fast.ops import library
from groupvit_fast.training.recipes import model_config, recipe


def conditions() -> dict[str, str] | str:
    """What the counts hold for, or why they cannot be had here."""
    if not library.HAS_CPU:
        return "nothing was compiled"
    return {"torch": torch.__version__.split("+")[0]}


class _Operators(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.count += 1
        return function(*arguments, **(keywords or {}))


def measure() -> dict[str, int]:
    """Counts of one step, warm, in float32 at batch 16."""
    torch.manual_seed(0)
    config = replace(recipe("tiny"), batch_size=16, steps=1000, quiet=True)
    settings = model_config(config)
    step = train_cases.Ours(create_model(settings, seed=0), config, "cpu", "float32")
    batch = train_cases.make_batch(settings, 16, config.multi_label, "cpu")
    for _ in range(2):
        step(batch)
    with _Operators() as operators:
        step(batch)
    sizes = [size for size in stopwatch.memory_events(lambda: step(batch)) if size > 0]
    return {"operators": operators.count, "allocations": len(sizes), "bytes allocated": sum(sizes)}
