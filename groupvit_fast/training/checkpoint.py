"""Checkpoints on disk: a step folder is complete and verified, or it is not seen.

    RUN/checkpoints/step_00000500/
        model.safetensors, config.json   the model, for every command that takes a checkpoint
        README.md                        what it is, for people
        trainer.pt                       optimiser, data position, counters: what only a resumed run needs
        SHA256SUMS                       of the others, as `sha256sum -c` reads it

A folder is written under a hidden name, forced to the disk and renamed, so that a crash at any moment
leaves either the new checkpoint or the ones before.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from groupvit_fast.console import UserError
from groupvit_fast.model.checkpoint_files import read_checkpoint
from groupvit_fast.model.checkpoint_write import our_files, write_file
from groupvit_fast.model.groupvit import GroupViT

SUMS = "SHA256SUMS"
STEP_NAME = re.compile(r"step_(\d{8,})")


def save(
    root: Path, step: int, model: GroupViT, state: dict[str, Any], *, keep: int, about: dict[str, Any]
) -> Path:
    """Write the checkpoint of `step` below `root`; then remove all but the `keep` newest, and any later ones.

    Later ones are those of a future that this run has left by resuming from an earlier step. `about` goes
    into config.json and says where the weights come from. A full disk or a forbidden folder is a
    `UserError`; the checkpoints that exist stay.
    """
    final = root / f"step_{step:08d}"
    temporary = root / f".writing-{final.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(".*-step_*"):
            shutil.rmtree(leftover)
        temporary.mkdir()
        for name, content in _contents(model, state, about).items():
            write_file(temporary / name, content)
        _flush(temporary)
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
    for folder in set(list_steps(root)) - set(earlier[-keep:]):
        _remove(folder)
    return final


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


def load_weights(folder: Path, model: GroupViT) -> None:
    """Fill `model` with the weights of a step folder; one of another configuration is a `UserError`."""
    saved = read_checkpoint(folder)
    there, here = _flat(saved.config.to_dict()), _flat(model.config.to_dict())
    different = [name for name in here if there[name] != here[name]]
    if different:
        name = different[0]
        more = f" and {len(different) - 1} more settings differ" if len(different) > 1 else ""
        raise UserError(
            f"{folder} holds another model: its {name} is {there[name]}, here it is {here[name]}{more}; "
            "resume with the preset and --model settings it was trained with"
        )
    model.load_state_dict(saved.state)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _contents(model: GroupViT, state: dict[str, Any], about: dict[str, Any]) -> dict[str, bytes]:
    """The files of a checkpoint, made in memory: then a full disk is a plain OSError of our own write."""
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    trainer = io.BytesIO()
    torch.save(state, trainer)
    files = {**our_files(weights, model.config, about), "trainer.pt": trainer.getvalue()}
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
