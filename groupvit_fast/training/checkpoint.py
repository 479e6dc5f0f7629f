"""Checkpoints on disk: a step folder is complete and verified, or it is not seen.

    RUN/checkpoints/step_00000500/
        model.safetensors, config.json   the model, for every command that takes a checkpoint
        README.md                        what it is, for people
        ema/                             the same for the averaged weights, if there are any
        trainer.pt                       optimiser, data position, counters: what only a resumed run needs
        SHA256SUMS                       of the others, as `sha256sum -c` reads it

A folder is written under a hidden name, forced to the disk and renamed, so that a crash at any moment
leaves either the new checkpoint or the ones before. `best` beside the step folders is a link to the one with
the best evaluation, which is kept.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groupvit_fast.console import UserError
from groupvit_fast.model.checkpoint_files import read_checkpoint
from groupvit_fast.model.checkpoint_write import our_files, write_file
from groupvit_fast.model.groupvit import GroupViT
from groupvit_fast.model.presets import ModelConfig
from groupvit_fast.training.sharding import fill

SUMS = "SHA256SUMS"
STEP_NAME = re.compile(r"step_(\d{8,})")


BEST = "best"


@dataclass(frozen=True)
class Snapshot:
    """A moment of a run, in host memory: what training does next can not change it any more.

    `about` goes into config.json and says where the weights come from; `state` is the trainer's own.
    """

    step: int
    config: ModelConfig
    weights: dict[str, Tensor]
    state: dict[str, Any]
    about: dict[str, Any]
    ema: dict[str, Tensor] | None = None


def step_folder(root: Path, step: int) -> Path:
    return root / f"step_{step:08d}"


def save(root: Path, snapshot: Snapshot, *, keep: int, best: int | None = None) -> Path:
    """Write a checkpoint below `root`; then remove all but the `keep` newest and `best`, and any later ones.

    Later ones are those of a future that this run has left by resuming from an earlier step. A full disk or
    a forbidden folder is a `UserError`; the checkpoints that exist stay.
    """
    step = snapshot.step
    final = step_folder(root, step)
    temporary = root / f".writing-{final.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(".*-step_*"):
            shutil.rmtree(leftover)
        temporary.mkdir()
        for name, content in _contents(snapshot).items():
            write_file(temporary / name, content)
        for folder in [*temporary.glob("*/"), temporary]:
            _flush(folder)
        if final.exists():
            _remove(final)
        os.rename(temporary, final)
        _flush(root)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = list_steps(root)
        remedy = f"the one of step {_number(kept[-1])} is intact" if kept else "there is no earlier one"
        raise UserError(
            f"cannot save the checkpoint of step {step} in {root}: {error.strerror or error}; {remedy}"
        ) from error
    earlier = [folder for folder in list_steps(root) if _number(folder) <= step]
    kept = {*earlier[-keep:], *(folder for folder in earlier if _number(folder) == best)}
    for folder in set(list_steps(root)) - kept:
        _remove(folder)
    return final


def mark_best(root: Path, step: int) -> None:
    """Let the link `best` lead to the checkpoint of `step`; where links can not be made, there is none."""
    temporary = root / f".{BEST}-link"
    try:
        temporary.unlink(missing_ok=True)
        os.symlink(step_folder(root, step).name, temporary)
        os.replace(temporary, root / BEST)
    except OSError:
        temporary.unlink(missing_ok=True)


def find(place: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest intact step folder of a run folder (or `place` itself, if it is one); None if there is none.

    Damaged ones are passed over with a warning each.
    """
    if STEP_NAME.fullmatch(place.resolve().name):
        damage = find_damage(place)
        if damage:
            raise UserError(
                f"checkpoint {place} is damaged: {damage}; resume from another step or from the run"
            )
        return place
    for folder in reversed(list_steps(place / "checkpoints")):
        damage = find_damage(folder)
        if damage is None:
            return folder
        warn(f"warning: passing over damaged checkpoint {folder}: {damage}")
    return None


def list_steps(root: Path) -> list[Path]:
    """Step folders below `root`, oldest first."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if STEP_NAME.fullmatch(path.name)), key=_number)


def find_damage(folder: Path) -> str | None:
    """What is wrong with a step folder, or None: every file must be there with its checksum."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        for line in lines:
            digest, name = line.split("  ")
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
                return f"the checksum of {name} does not match"
    except (OSError, ValueError) as error:
        return (
            f"{SUMS} is not readable"
            if isinstance(error, ValueError)
            else f"{error.strerror}: {error.filename}"
        )
    return None if lines else f"{SUMS} is empty"


def load_state(folder: Path) -> dict[str, Any]:
    """The trainer's state of a step folder. Tensors and plain values only: no code in the file is run."""
    try:
        return torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds a model but no trainer.pt, so training can not resume from it"
        ) from None
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise UserError(
            f"{folder / 'trainer.pt'} is not a trainer state: {str(error).splitlines()[0]}"
        ) from None


def load_weights(folder: Path, model: GroupViT, *, ema: bool = False) -> bool:
    """Fill `model` with the weights of a step folder; one of another configuration is a `UserError`.

    With `ema` with the averaged ones; returns whether the folder has them.
    """
    if ema and not (folder / "ema").is_dir():
        return False
    saved = read_checkpoint(folder / "ema" if ema else folder)
    there, here = _flat(saved.config.to_dict()), _flat(model.config.to_dict())
    different = [name for name in here if there[name] != here[name]]
    if different:
        name = different[0]
        more = f" and {len(different) - 1} more settings differ" if len(different) > 1 else ""
        raise UserError(
            f"{folder} holds another model: its {name} is {there[name]}, here it is {here[name]}{more}; "
            "resume with the preset and --model settings it was trained with"
        )
    fill(model, saved.state)
    return True


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _contents(snapshot: Snapshot) -> dict[str, bytes]:
    """The files of a checkpoint, made in memory: then a full disk is a plain OSError of our own write."""
    trainer = io.BytesIO()
    torch.save(snapshot.state, trainer)
    files = our_files(snapshot.weights, snapshot.config, snapshot.about)
    if snapshot.ema is not None:
        about = {**snapshot.about, "weights": "exponential moving average"}
        averaged = our_files(snapshot.ema, snapshot.config, about)
        files |= {f"ema/{name}": content for name, content in averaged.items()}
    files["trainer.pt"] = trainer.getvalue()
    sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items())
    return {**files, SUMS: sums.encode()}


def _flush(folder: Path) -> None:
    """Force the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(folder: Path) -> None:
    """Delete a step folder so that no half of it is ever seen."""
    hidden = folder.with_name(f".removing-{folder.name}")
    os.rename(folder, hidden)
    shutil.rmtree(hidden)


def _number(folder: Path) -> int:
    return int(STEP_NAME.fullmatch(folder.name)[1])
