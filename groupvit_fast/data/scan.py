"""Finding the usable samples of one tar shard.

A sample is an image and a caption whose member names differ only in the last extension (img2dataset and
webdataset layout), in any order in the tar. Anything that training could stumble over is left out and named.

The compiled scan (csrc/shard_scan.cpp) holds no interpreter lock, so threads read several shards at once;
without it the same rules run in Python (scan_python.py), with the same results.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from groupvit_fast.console import UserError
from groupvit_fast.data.images import MAX_PIXELS
from groupvit_fast.data.index_nouns import StoredNouns
from groupvit_fast.data.native import native_module
from groupvit_fast.data.scan_python import PythonScan
from groupvit_fast.data.text import clean

VERSION = 2  # of the scan's rules: a stored index of another version is made again
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CAPTION_EXTENSIONS = ("txt", "text")
MAX_CAPTION_BYTES = 8192  # 77 tokens hardly ever need more; a caption of a megabyte is cut here
COLUMNS = (
    "image_offset", "image_size", "caption_offset", "caption_size", "width", "height", "caption_hash",
)  # fmt: skip
_KINDS = dict.fromkeys(map(str.encode, IMAGE_EXTENSIONS), "image")
_KINDS |= dict.fromkeys(map(str.encode, CAPTION_EXTENSIONS), "caption")
_HEAD_BYTES, _TAIL_BYTES = 1 << 13, 1 << 14  # of a tar, to notice that it was written anew
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

Stamp = tuple[int, int, int, str]


@dataclass(frozen=True)
class ShardIndex:
    """The usable samples of one tar, in the order of the tar; every array is int64 [samples]."""

    tar: Path
    stamp: Stamp  # what `file_stamp` said when the tar was scanned
    image_offset: np.ndarray
    image_size: np.ndarray
    caption_offset: np.ndarray
    caption_size: np.ndarray
    width: np.ndarray
    height: np.ndarray
    caption_hash: np.ndarray  # equal for equal captions
    key_end: np.ndarray  # end of each key in key_bytes
    key_bytes: bytes
    rejected: tuple[tuple[str, str], ...]  # (key, reason)
    verified: str = "header"  # or "full": every image was decoded
    nouns: StoredNouns | None = None

    def __len__(self) -> int:
        return len(self.image_offset)

    def key(self, sample: int) -> str:
        """The member name of a sample without its extension."""
        start = self.key_end[sample - 1] if sample else 0
        return self.key_bytes[start : self.key_end[sample]].decode("utf-8", "surrogateescape")

    def without(self, reasons: dict[int, str]) -> ShardIndex:
        """The index less the samples that `reasons` tells why to leave out."""
        keep = np.ones(len(self), dtype=bool)
        keep[list(reasons)] = False
        key_end, key_bytes = _keys_of(keep, self.key_end, self.key_bytes)
        named = tuple((self.key(sample), reason) for sample, reason in sorted(reasons.items()))
        return replace(
            self,
            **{name: getattr(self, name)[keep] for name in COLUMNS},
            key_end=key_end,
            key_bytes=key_bytes,
            rejected=self.rejected + named,
            nouns=None,
        )


class RawScan(NamedTuple):
    """All samples of a tar, usable or not, as both scans deliver them."""

    is_tar: bool
    table: np.ndarray  # int64 [samples, 7]: COLUMNS
    key_end: np.ndarray  # int64 [samples]
    keys: bytes
    faults: list[tuple[int, str]]  # (sample, why it cannot be used)
    unclear: np.ndarray  # samples whose caption may turn out empty once it is cleaned
    notes: list[tuple[bytes, str]]  # (key, or b"" for the tar; what is wrong)


def scan(tar: Path) -> ShardIndex:
    """Read the headers of `tar`, look at each sample's head and tail, and return the usable ones."""
    handle = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
    try:
        stamp = file_stamp(tar)
        _check_start(tar, handle, stamp[1])
        raw = _scan_native(handle) if native_module("scan_shard") else _scan_python(handle)
        if not raw.is_tar:
            raise UserError(f"{tar}: not a tar file; download it again")
        return _usable(tar, stamp, raw, _faults(handle, raw))
    finally:
        os.close(handle)


def file_stamp(tar: Path) -> Stamp:
    """What must be unchanged for a stored index to be used: VERSION, size, time in ns, hash of both ends."""
    with open(tar, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        digest = hashlib.blake2b(file.read(_HEAD_BYTES), digest_size=8)
        digest.update(os.pread(file.fileno(), _TAIL_BYTES, max(0, status.st_size - _TAIL_BYTES)))
    return VERSION, status.st_size, status.st_mtime_ns, digest.hexdigest()


def _check_start(tar: Path, handle: int, size: int) -> None:
    if size == 0:
        raise UserError(f"{tar}: the shard is empty; delete or download it again")
    start = os.pread(handle, 8, 0)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(f"{tar}: is compressed with {name}, not an uncompressed tar; unpack it")


def _scan_native(handle: int) -> RawScan:
    is_tar, table, key_end, keys, faults, unclear, notes = native_module("scan_shard").scan_shard(
        handle, MAX_PIXELS, MAX_CAPTION_BYTES
    )
    numbers = [np.frombuffer(data, np.int64) for data in (table, key_end, unclear)]
    return RawScan(is_tar, numbers[0].reshape(-1, len(COLUMNS)), numbers[1], keys, faults, numbers[2], notes)


def _scan_python(handle: int) -> RawScan:
    scan = PythonScan(handle, _KINDS, MAX_PIXELS, MAX_CAPTION_BYTES)
    table = scan.table.reshape(-1, len(COLUMNS))
    keys, unclear = b"".join(scan.keys), np.array(scan.unclear, np.int64)
    return RawScan(scan.is_tar, table, _ends(scan.keys), keys, scan.faults, unclear, scan.notes)


def _faults(handle: int, raw: RawScan) -> dict[int, str]:
    """All faults by sample, the empty captions among them, in the order of the tar."""
    faults = dict(raw.faults)
    for sample in raw.unclear.tolist():
        offset, size = raw.table[sample, 2:4].tolist()
        caption = os.pread(handle, min(size, MAX_CAPTION_BYTES), offset)
        if not clean(caption.decode("utf-8", "replace")):
            faults[sample] = "empty caption"
    return dict(sorted(faults.items()))


def _usable(tar: Path, stamp: Stamp, raw: RawScan, faults: dict[int, str]) -> ShardIndex:
    ends = raw.key_end.tolist()

    def key(sample: int) -> str:
        start = ends[sample - 1] if sample else 0
        return raw.keys[start : ends[sample]].decode("utf-8", "surrogateescape")

    rejected = [(name.decode("utf-8", "surrogateescape") or tar.name, reason) for name, reason in raw.notes]
    rejected += [(key(sample), reason) for sample, reason in faults.items()]
    good = np.ones(len(ends), dtype=bool)
    good[list(faults)] = False
    key_end, key_bytes = _keys_of(good, raw.key_end, raw.keys)
    columns = dict(zip(COLUMNS, np.ascontiguousarray(raw.table[good].T), strict=True))
    return ShardIndex(tar, stamp, key_end=key_end, key_bytes=key_bytes, rejected=tuple(rejected), **columns)


def _keys_of(kept: np.ndarray, key_end: np.ndarray, key_bytes: bytes) -> tuple[np.ndarray, bytes]:
    """The keys of some samples (bool [samples]), as ends and bytes, without a look at each."""
    sizes = np.diff(key_end, prepend=0)
    letters = np.frombuffer(key_bytes, np.uint8)[np.repeat(kept, sizes)]
    return np.cumsum(sizes[kept], dtype=np.int64), letters.tobytes()


def _ends(keys: Sequence[bytes]) -> np.ndarray:
    return np.cumsum([len(key) for key in keys], dtype=np.int64)
