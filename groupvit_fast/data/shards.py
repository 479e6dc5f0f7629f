"""Writing webdataset tar shards of image-caption pairs."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import webdataset

from groupvit_fast.console import UserError
from groupvit_fast.data.scan import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS


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
        _write_shard(shards[-1], chunk)
    return shards


def _write_shard(path: Path, numbered: list[tuple[int, Pair]]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with webdataset.TarWriter(str(temporary), mtime=0, encoder=False) as writer:
            for number, pair in numbered:
                caption = pair.caption.encode("utf-8", "replace")
                writer.write({"__key__": f"{number:09d}", pair.extension: pair.image, "txt": caption})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def pairs_of_folder(folder: str | Path) -> Iterator[Pair]:
    """Every image under `folder`, sorted by path, that has its caption in a text file of the same name."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a folder of images with .txt captions beside them")
    for path in sorted(folder.rglob("*")):
        extension = path.suffix[1:].lower()
        if extension not in IMAGE_EXTENSIONS or path.name.startswith("."):
            continue
        captions = [path.with_suffix(f".{kind}") for kind in CAPTION_EXTENSIONS]
        caption = next((place for place in captions if place.is_file()), None)
        if caption is not None:
            yield Pair(path.read_bytes(), extension, caption.read_text("utf-8", "replace"))
