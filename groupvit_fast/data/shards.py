"""Writing webdataset tar shards of image-caption pairs."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import webdataset

from groupvit_fast.console import UserError


class Pair(NamedTuple):
    """One sample to be written."""

    image: bytes  # an encoded image file
    extension: str  # "jpg", "png", "webp"
    caption: str


def write_shards(
    pairs: Iterable[Pair], folder: str | Path, *, prefix: str = "", samples_per_shard: int = 10_000
) -> list[Path]:
    """Write `pairs` to folder/<prefix>000000.tar, ...; returns the paths.

    Keys are running numbers of nine digits, as img2dataset makes them. The same pairs give the same bytes.
    A shard gets its name only when it is complete.
    """
    if samples_per_shard < 1:
        raise UserError(f"samples per shard is {samples_per_shard}; use 1 or more")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    numbered = enumerate(pairs)
    shards: list[Path] = []
    while chunk := list(itertools.islice(numbered, samples_per_shard)):
        shards.append(folder / f"{prefix}{len(shards):06d}.tar")
        write_shard(shards[-1], chunk)
    return shards


def write_shard(path: Path, numbered: Iterable[tuple[int, Pair]]) -> None:
    """Write one shard of numbered pairs; it gets its name only when it is complete and on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # left by a run that was killed
    try:
        with open(temporary, "xb") as file:
            with webdataset.TarWriter(file, mtime=0, encoder=False) as writer:
                for number, pair in numbered:
                    caption = pair.caption.encode("utf-8", "replace")
                    writer.write({"__key__": f"{number:09d}", pair.extension: pair.image, "txt": caption})
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
