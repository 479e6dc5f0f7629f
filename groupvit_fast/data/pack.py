"""Packing samples into tar shards: in parallel, and a run that was killed continues.

`pack.json` beside the shards remembers what went into each. A shard whose samples are still the same is left
as it is, so that the result is that of one uninterrupted run, byte for byte.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from groupvit_fast.console import UserError, write_json
from groupvit_fast.data.pack_sources import Item, Skip
from groupvit_fast.data.shards import Pair, write_shard

_MANIFEST = "pack.json"
_VERSION = 1


def pack(
    items: Iterable[Item],
    folder: Path,
    source: str,
    skip: Skip,
    *,
    samples_per_shard: int = 10_000,
    bytes_per_shard: int = 1 << 30,
    progress: Callable[[int], Any] = lambda samples: None,
) -> list[Path]:
    """Write `items` to folder/000000.tar, ...; returns the paths of all shards.

    A shard is full at `samples_per_shard` samples, or when the next image would lift it above
    `bytes_per_shard`; one larger image gets a shard of its own. `source` says what is packed: a folder that
    holds something else is a UserError. `progress` is told of finished samples.
    """
    if samples_per_shard < 1 or bytes_per_shard < 1:
        raise UserError("a shard needs room for at least one sample and one byte")
    folder.mkdir(parents=True, exist_ok=True)
    workers = len(os.sched_getaffinity(0))
    with _locked(folder), ThreadPoolExecutor(workers) as pool:
        manifest = _open_manifest(folder, source)
        waiting: deque[tuple[str, dict, int, Future | None]] = deque()
        packed: dict[str, dict] = {}

        def finish() -> None:
            name, entry, samples, job = waiting.popleft()
            if job is not None:
                job.result()
                manifest["shards"][name] = entry
                write_json(folder / _MANIFEST, manifest)
            packed[name] = entry
            progress(samples)

        try:
            for name, first, chunk in _cut(items, samples_per_shard, bytes_per_shard):
                entry = {"samples": len(chunk), "content": _digest(first, chunk)}
                done = manifest["shards"].get(name) == entry and (folder / name).is_file()
                job = None if done else pool.submit(_write, folder / name, first, chunk, skip)
                waiting.append((name, entry, len(chunk), job))
                while len(waiting) > workers:  # what waits keeps its captions, or its images, in memory
                    finish()
            while waiting:
                finish()
        finally:
            pool.shutdown(cancel_futures=True)
        _drop_others(folder, manifest, packed)
    return [folder / name for name in packed]


def _cut(items: Iterable[Item], most: int, most_bytes: int) -> Iterator[tuple[str, int, list[Item]]]:
    """(shard name, number of its first sample, items) of each shard."""
    chunk: list[Item] = []
    first = size = shard = 0
    for item in items:
        if chunk and (len(chunk) == most or size + item.size > most_bytes):
            yield f"{shard:06d}.tar", first, chunk
            first, shard, size, chunk = first + len(chunk), shard + 1, 0, []
        chunk.append(item)
        size += item.size
    if chunk:
        yield f"{shard:06d}.tar", first, chunk


def _digest(first: int, chunk: list[Item]) -> str:
    digest = hashlib.sha256(str(first).encode())
    for item in chunk:
        digest.update(json.dumps([item.identity, item.extension, item.caption]).encode())
    return digest.hexdigest()


def _write(path: Path, first: int, chunk: list[Item], skip: Skip) -> None:
    def pairs() -> Iterator[tuple[int, Pair]]:
        for number, item in enumerate(chunk, first):
            try:
                image = item.image.read_bytes() if isinstance(item.image, Path) else item.image
            except OSError as error:
                skip(str(item.image), error.strerror or str(error))
                continue
            yield number, Pair(image, item.extension, item.caption)

    write_shard(path, pairs())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two runs must not write the same shards."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"{folder}: another pack is writing there; wait for it or stop it") from None
    finally:
        os.close(handle)


def _open_manifest(folder: Path, source: str) -> dict[str, Any]:
    path = folder / _MANIFEST
    for left in folder.glob(f".{_MANIFEST}.*"):  # half written when a run was killed
        left.unlink()
    if path.exists():
        try:
            manifest = json.loads(path.read_text("utf-8"))
            if manifest["version"] == _VERSION and manifest["source"] == source:
                return {**manifest, "shards": dict(manifest["shards"])}
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}: damaged; delete it with the shards or pack into another folder"
            ) from None
        raise UserError(f"{folder}: holds shards packed from {manifest['source']}; choose another folder")
    if any(folder.glob("*.tar")):
        raise UserError(f"{folder}: holds tar files that pack did not write; choose another folder")
    manifest = {"version": _VERSION, "source": source, "shards": {}}
    write_json(path, manifest)
    return manifest


def _drop_others(folder: Path, manifest: dict[str, Any], packed: dict[str, dict]) -> None:
    """Remove shards of an earlier run that the source has no samples for any more."""
    for name in manifest["shards"].keys() - packed.keys():
        if Path(name).name == name:  # an edited list must not lead out of the folder
            (folder / name).unlink(missing_ok=True)
    if manifest["shards"] != packed:
        write_json(folder / _MANIFEST, {**manifest, "shards": packed})
