"""Recipes: the settings of published runs and of the built-in demonstration.

A recipe is a function that returns a `TrainConfig`; a variant calls another recipe and changes what
differs, so that two recipes can be compared by reading them.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from groupvit_fast.console import UserError
from groupvit_fast.model.presets import ModelConfig
from groupvit_fast.model.presets import preset as model_preset
from groupvit_fast.training.config import TrainConfig


def groupvit_gcc_yfcc() -> TrainConfig:
    """The published recipe on CC3M + CC12M + YFCC14M: 30 epochs at a global batch of 4096.

    Sources: paper section 4.1 and the public default configuration (base rate 1.6e-3 scaled linearly from
    4096, two warm-up epochs where the paper says five, three single-noun prompts an image).
    """
    return TrainConfig(
        preset="groupvit-gcc-yfcc",
        epochs=30.0,
        batch_size=256,
        lr=1.6e-3,
        lr_batch=4096,
        min_lr=4e-5,
        warmup_lr=4e-6,
        warmup_epochs=2.0,
        weight_decay=0.05,
        clip_grad=5.0,
        multi_label=3,
        aa="rand-m9-mstd0.5-inc1",
        color_jitter=0.4,
        reprob=0.25,
    )


def groupvit_gcc_redcaps() -> TrainConfig:
    """CC3M + CC12M + RedCaps12M; the multi-label loss is off, which the authors found better there."""
    return replace(groupvit_gcc_yfcc(), preset="groupvit-gcc-redcaps", multi_label=0)


def groupvit_1stage() -> TrainConfig:
    """The one-stage model of the paper's ablation (table 2), trained on CC12M."""
    return replace(groupvit_gcc_yfcc(), preset="groupvit-1stage")


def tiny() -> TrainConfig:
    """Minutes on two CPU cores, on the built-in shapes dataset; values found by trial, not from the paper.

    Prompts are bare nouns, all that a caption has, and each is matched with an image's best group instead
    of the mean of its groups: with so few images the paper's mean leaves the groups mixed.
    """
    return TrainConfig(
        preset="tiny",
        steps=1200,
        batch_size=128,
        lr=2e-3,
        min_lr=2e-5,
        warmup_lr=2e-5,
        warmup_steps=100,
        weight_decay=0.05,
        beta2=0.98,
        clip_grad=5.0,
        multi_label=5,
        multi_label_match="group",
        contrastive_weight=0.5,
        min_crop=0.4,
        prompt_templates="noun",
        noun_tags="nouns",
        prompt_fill="noun",
    )


SIGLIP_START = {"logit_scale_init": math.log(10), "logit_bias_init": -10.0}
"""Temperature and bias that SigLIP's authors start from."""

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "tiny": tiny,
    "groupvit-gcc-yfcc": groupvit_gcc_yfcc,
    "groupvit-gcc-redcaps": groupvit_gcc_redcaps,
    "groupvit-1stage": groupvit_1stage,
}


def recipe(name: str) -> TrainConfig:
    """The recipe called `name`; an unknown name is an error that shows the nearest one."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.0)
        raise UserError(f"unknown preset {name!r}: did you mean {near[0]!r}? (known: {', '.join(RECIPES)})")
    return RECIPES[name]()


def model_config(config: TrainConfig) -> ModelConfig:
    """The model of a run: the preset's, with the changes of `--model`, and a second temperature if needed."""
    values = model_preset(config.preset).to_dict()
    values["multi_label_logit_scale"] = config.multi_label > 0
    if config.siglip:
        values |= SIGLIP_START
    for path, value in config.model.items():
        *parents, leaf = path.split(".")
        place: Any = values
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if not isinstance(place, dict) or leaf not in place:
            known = [*_paths(values)]
            near = difflib.get_close_matches(path, known, n=1, cutoff=0.0)
            raise UserError(f"--model {path}: the model has no such setting; did you mean {near[0]}?")
        place[leaf] = value
    try:
        return ModelConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise UserError(f"--model: {error}") from error


def _paths(values: dict, prefix: str = "") -> list[str]:
    paths = []
    for name, value in values.items():
        paths += _paths(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
    return paths
