"""The folder of a run: where a new one goes, what an old one says, what of it is kept for the next."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from groupvit_fast.console import UserError
from groupvit_fast.training import checkpoint, distributed, options
from groupvit_fast.training.config import TrainConfig
from groupvit_fast.training.distributed import World
from groupvit_fast.training.sources import absolute


def saved_options(given: argparse.Namespace) -> dict[str, Any] | None:
    """The options of the run that is continued, so that `--resume DIR` alone continues it as it was."""
    resume = getattr(given, "resume", None)
    place = getattr(given, "output", None) if resume == "auto" else resume
    if place is None:
        return None
    run = run_of(Path(place).expanduser())
    if not (run / "config.yaml").is_file() or not checkpoint.list_steps(run / "checkpoints"):
        return None
    saved = options.read_yaml(run / "config.yaml")
    preset = getattr(given, "preset", None)
    if preset not in (None, saved["preset"]):
        raise UserError(
            f"{run} was trained with --preset {saved['preset']}, not {preset}; leave --preset out"
        )
    return saved | {"output": str(getattr(given, "output", run))}


def run_of(place: Path) -> Path:
    """The run that a run folder or one of its step folders belongs to."""
    place = place.resolve()
    return place.parent.parent if checkpoint.STEP_NAME.fullmatch(place.name) else place


def as_saved(config: TrainConfig, dtype: str) -> TrainConfig:
    """The options to continue or repeat the run with, from any folder."""
    data = [absolute(spec) for spec in config.data]
    paths = {name: getattr(config, name) for name in ("data_root", "json", "shard_cache")}
    paths = {name: path and path.absolute() for name, path in paths.items()}
    held_out = [_absolute(place) for place in config.eval_data]
    changed = {"data": data, "eval_data": held_out, "amp_dtype": dtype, "seed_sweep": None}
    return replace(config, **paths, **changed, output=None, resume=None)


def _absolute(place: str) -> str:
    """DIR or DATASET=DIR with an absolute folder."""
    name, equals, folder = place.partition("=")
    if equals and not os.path.exists(place):
        return f"{name}={os.path.abspath(os.path.expanduser(folder))}"
    return os.path.abspath(os.path.expanduser(place))


def choose_output(config: TrainConfig) -> Path:
    """The run folder, not made yet; that it can be made, and the --json file written, is checked."""
    default = Path("runs") / f"{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    output = distributed.from_main(config.output or default)
    for path in (output, config.json.parent if config.json else output):
        existing = next(parent for parent in [path, *path.absolute().parents] if parent.exists())
        if not existing.is_dir():
            raise UserError(f"cannot write to {path}: {existing} is not a folder")
        if not os.access(existing, os.W_OK):
            raise UserError(f"cannot write to {path}: no permission in {existing}")
    return output


def checkpoint_to_resume(
    config: TrainConfig, output: Path, world: World, say: Callable[[str], None]
) -> Path | None:
    """The step folder to continue from. A folder that holds a run is never started over by accident."""
    place = output if config.resume in (None, "auto") else Path(config.resume).expanduser()
    if config.resume == "auto" and config.output is None:
        raise UserError("--resume auto needs --output: the run folder to look into")
    if config.resume is None:
        if checkpoint.list_steps(output / "checkpoints"):
            raise UserError(f"{output} holds a run already; add --resume auto or name another --output")
        return None
    if config.resume != "auto" and not place.is_dir():
        raise UserError(f"--resume {place}: no such folder; name a run folder or one of its step folders")
    found = distributed.from_main(checkpoint.find(place, say) if world.is_main else None)
    if found is None and config.resume != "auto":
        raise UserError(f"--resume {place}: no usable checkpoint there (looked for checkpoints/step_*)")
    return found
