"""What an interrupted evaluation leaves behind, so that the next one goes on: counts, and of which images.

A folder holds a file for each process that worked: its tally, a bit for each image that the tally contains,
and the images it left out. Each file is replaced as a whole. Any set of files without a common image is a
valid start; what a crash left twice is counted once, because a file that shares an image with those already
taken is passed over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from groupvit_fast.console import write_bytes_atomically
from groupvit_fast.segmentation.tally import Tally


@dataclass
class Progress:
    """Counts so far: the tally, the numbers of the images in it or left out, and why those were."""

    tally: Tally
    done: set[int] = field(default_factory=set)
    left_out: dict[int, dict[str, str]] = field(default_factory=dict)
    seconds: float = 0.0

    def merge(self, other: Progress) -> None:
        """Take over the work on other images."""
        self.tally.merge(other.tally)
        self.done |= other.done
        self.left_out |= other.left_out
        self.seconds += other.seconds

    def to_bytes(self, fingerprint: str) -> bytes:
        tensors = self.tally.to_tensors()
        tensors["done"] = torch.tensor(sorted(self.done), dtype=torch.int64)
        left_out = json.dumps(list(self.left_out.items()))
        about = {"fingerprint": fingerprint, "left_out": left_out, "seconds": repr(self.seconds)}
        about["sum"] = _checksum(tensors)
        return save({name: tensor.contiguous() for name, tensor in tensors.items()}, about)

    @classmethod
    def from_bytes(cls, data: bytes, fingerprint: str) -> Progress | None:
        """None for what another evaluation left behind, or what is damaged."""
        try:
            tensors = load(data)
            about = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            if about["fingerprint"] != fingerprint or about["sum"] != _checksum(tensors):
                return None
            left_out = {int(number): reason for number, reason in json.loads(about["left_out"])}
            done = set(tensors.pop("done").tolist())
            return cls(Tally.from_tensors(tensors), done, left_out, float(about["seconds"]))
        except (SafetensorError, KeyError, ValueError):
            return None


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def fingerprint(model: torch.nn.Module, keys: Sequence[str], settings: Mapping[str, Any]) -> str:
    """A name for an evaluation that changes with anything that changes its counts."""
    digest = hashlib.sha256(json.dumps([list(keys), settings], sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class PartialResults:
    """The folder of partial results of one evaluation."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name

    def load(self) -> Progress | None:
        """The sum of what was done before, if anything was."""
        found = []
        for path in sorted(self.folder.glob("*.part")):
            progress = Progress.from_bytes(path.read_bytes(), self.name)
            if progress is not None:
                found.append(progress)
        total: Progress | None = None
        for progress in sorted(found, key=lambda item: -len(item.done)):
            if total is None:
                total = progress
            elif not total.done & progress.done:
                total.merge(progress)
        return total

    def save(self, progress: Progress, rank: int) -> None:
        write_bytes_atomically(self.folder / f"{rank}.part", progress.to_bytes(self.name))

    def keep_only(self, rank: int) -> None:
        """Remove the other files, once one file holds the sum."""
        for path in self.folder.glob("*.part"):
            if path.name != f"{rank}.part":
                path.unlink()
