"""Read a checkpoint of any layout: our directories and runs, Hugging Face directories, official files."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from groupvit_fast.model.checkpoint_config import (
    FORMAT,
    CheckpointError,
    config_from_hf,
    config_from_official,
    config_from_ours,
)
from groupvit_fast.model.checkpoint_keys import KeyReport, to_ours
from groupvit_fast.model.checkpoint_write import HF_EXTRA, plain_key
from groupvit_fast.model.groupvit import GroupViT, create_model
from groupvit_fast.model.presets import ModelConfig
from groupvit_fast.model.safe_pickle import UnsafePickleError, load_pickle

_STEP = re.compile(r"step_\d+")
# Buffers which older versions of transformers stored and which hold nothing that was learnt.
_IDLE = re.compile(r".*\.position_ids")


@dataclass
class Checkpoint:
    """A checkpoint in our names.

    `state` is complete: parameters that the file lacks are freshly initialised, and `report` names them.
    `about` is what is known of the weights (origin, data, recipe, results); `placeholders` the foreign
    classes that were in a pickle and not imported.
    """

    layout: str
    config: ModelConfig
    state: dict[str, Tensor]
    report: KeyReport
    about: dict[str, Any]
    placeholders: list[str]


class Source(NamedTuple):
    """What was read from the disk, in the names of its layout."""

    layout: str
    config: ModelConfig
    about: dict[str, Any]
    stored: dict[str, Tensor]
    placeholders: list[str]


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    partial: bool = False,
) -> GroupViT:
    """Load a GroupViT of any layout, in evaluation mode.

    Args:
        path: a training run (its newest complete step), one of its step folders, any directory of ours
            or of Hugging Face (model.safetensors and config.json), or an official .pth file.
        device: where to put it.
        dtype: of its parameters; None keeps what is stored.
        partial: accept missing, unexpected and mis-shaped parameters; what is missing is initialised.

    Raises:
        CheckpointError: nothing there, not a GroupViT, damaged, unsafe, or not complete.
    """
    checkpoint = read_checkpoint(path, partial=partial)
    with torch.device("meta"):
        model = create_model(checkpoint.config)
    model.load_state_dict(checkpoint.state, assign=True)
    return model.requires_grad_().to(device=device, dtype=dtype).eval()


def read_checkpoint(path: str | Path, *, partial: bool = False) -> Checkpoint:
    """Read and translate a checkpoint without making a model of it; arguments and errors as `load_model`."""
    path = Path(path)
    try:
        place = find_source(path)
        source = read_file(place) if place.is_file() else read_directory(place)
        config = source.config
        layers = sum(config.image.depths) + config.text.layers
        if layers > len(source.stored):
            raise ValueError(f"it claims {layers} layers and has {len(source.stored)} tensors")
        with torch.device("meta"):
            expected = create_model(config).state_dict()
    except CheckpointError:
        raise
    except UnsafePickleError as error:
        raise CheckpointError(f"{path}: refused: {error}") from None
    except KeyError as error:
        raise CheckpointError(f"{path}: is no GroupViT checkpoint: it has no {error.args[0]}") from None
    except (ValueError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: can not be read: {error}") from None
    stored = {plain_key(name): value for name, value in source.stored.items() if not _IDLE.fullmatch(name)}
    state, report = to_ours(stored, source.layout, expected)
    if not report.complete and not partial:
        raise CheckpointError(
            f"{path}: does not fit its model: {describe(report)}; convert it with --partial to accept that"
        )
    if len(state) < len(expected):
        dtype = next((value.dtype for value in state.values() if value.is_floating_point()), None)
        state = {**create_model(config, seed=0).to(dtype=dtype).state_dict(), **state}
    about = {**run_notes(path), **source.about}
    return Checkpoint(source.layout, config, state, report, about, source.placeholders)


def describe(report: KeyReport, limit: int = 3) -> str:
    """The report in one line, at most `limit` names of each kind."""
    kinds = {"missing": report.missing, "unexpected": report.unexpected, "of another shape": report.misshaped}
    parts = []
    for kind, names in kinds.items():
        if names:
            more = f" and {len(names) - limit} more" if len(names) > limit else ""
            parts.append(f"{len(names)} {kind} ({', '.join(names[:limit])}{more})")
    return "; ".join(parts)


def find_source(path: Path) -> Path:
    """The directory or file that `path` stands for: of a training run, the newest complete step."""
    if path.is_file():
        return path.parent if path.suffix == ".safetensors" else path
    if not path.exists():
        raise CheckpointError(
            f"{path}: does not exist; name a training run, a checkpoint directory or a .pth file"
        )
    if is_complete(path):
        return path
    folders = [path / "checkpoints", path]
    steps = [
        step
        for folder in folders
        if folder.is_dir()
        for step in folder.iterdir()
        if _STEP.fullmatch(step.name)
    ]
    steps = sorted((step for step in steps if is_complete(step)), key=lambda step: int(step.name[5:]))
    if not steps:
        raise CheckpointError(
            f"{path}: holds no checkpoint: neither model.safetensors with config.json nor checkpoints/step_*"
        )
    return steps[-1]


def is_complete(path: Path) -> bool:
    """Whether a directory has a configuration and weights."""
    weights = ("model.safetensors", "pytorch_model.bin")
    return (path / "config.json").is_file() and any((path / name).is_file() for name in weights)


def read_directory(path: Path) -> Source:
    """Read a directory of ours or of Hugging Face."""
    values = json.loads((path / "config.json").read_text(encoding="utf-8"))
    weights, placeholders = path / "model.safetensors", []
    if weights.is_file():
        stored = safetensors.torch.load_file(weights)
    else:
        stored, placeholders = load_pickle(path / "pytorch_model.bin")
    if values.get("format") == FORMAT:
        return Source("ours", *config_from_ours(values), stored, placeholders)
    if values.get("model_type") != "groupvit":
        raise CheckpointError(f"{path}: its config.json describes no GroupViT: {values.get('model_type')}")
    kept = {name: values.get(FORMAT, {}).get(name) for name in HF_EXTRA}
    dtype = stored["logit_scale"].dtype
    stored.update(
        (name, torch.tensor(value, dtype=dtype)) for name, value in kept.items() if value is not None
    )
    return Source("hf", *config_from_hf(values), stored, placeholders)


def read_file(path: Path) -> Source:
    """Read an official .pth file, or one with the same names."""
    payload, placeholders = load_pickle(path)
    if not isinstance(payload, dict):
        raise CheckpointError(f"{path}: holds a {type(payload).__name__} and no state dict")
    stored = payload.get("model", payload.get("state_dict", payload))
    if not isinstance(stored, dict) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise CheckpointError(
            f'{path}: holds no state dict: neither "model" nor "state_dict" nor tensors alone'
        )
    stored = {plain_key(str(name)): value for name, value in stored.items()}
    if FORMAT in payload:
        return Source("official", *config_from_ours(payload[FORMAT]), stored, placeholders)
    about = {"origin": "official", "source": path.name}
    return Source("official", config_from_official(stored), about, stored, placeholders)


def run_notes(path: Path) -> dict[str, Any]:
    """What a training run's folder says of its weights: the recipe, and the final evaluation."""
    notes: dict[str, Any] = {}
    if (path / "config.yaml").is_file():
        notes["recipe"] = f"```yaml\n{(path / 'config.yaml').read_text(encoding='utf-8').strip()}\n```"
    if (path / "result.json").is_file():
        notes["results"] = json.loads((path / "result.json").read_text(encoding="utf-8"))
    return notes
