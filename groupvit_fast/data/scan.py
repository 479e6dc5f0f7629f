"""Finding the usable samples of one tar shard.

A sample is an image and a caption whose member names differ only in the last extension (img2dataset and
webdataset layout), in any order in the tar. Anything that training could stumble over is left out and named.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from groupvit_fast.console import UserError
from groupvit_fast.data.images import MAX_PIXELS, probe_size
from groupvit_fast.data.text import clean

VERSION = 1  # of the scan's rules: a stored index of another version is made again
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CAPTION_EXTENSIONS = ("txt", "text")
_KINDS = dict.fromkeys(IMAGE_EXTENSIONS, "image") | dict.fromkeys(CAPTION_EXTENSIONS, "caption")
MAX_CAPTION_BYTES = 8192  # 77 tokens hardly ever need more; a caption of a megabyte is cut here
_END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
# A damaged header can make tarfile compute an offset that no file has.
_TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError)
_HEAD_BYTES = 1 << 16
_TAIL_BYTES = 1 << 10


@dataclass(frozen=True)
class ShardIndex:
    """The usable samples of one tar, in the order of the tar; every array is int64 [samples]."""

    tar: Path
    stamp: tuple[int, int, int]  # VERSION, size and modification time (ns) of the tar when it was scanned
    image_offset: np.ndarray
    image_size: np.ndarray
    caption_offset: np.ndarray
    caption_size: np.ndarray
    width: np.ndarray
    height: np.ndarray
    key_end: np.ndarray  # end of each key in key_bytes
    key_bytes: bytes
    rejected: tuple[tuple[str, str], ...]  # (key, reason)

    def __len__(self) -> int:
        return len(self.image_offset)

    def key(self, sample: int) -> str:
        """The member name of a sample without its extension."""
        start = self.key_end[sample - 1] if sample else 0
        return self.key_bytes[start : self.key_end[sample]].decode("utf-8", "surrogateescape")


class _Rejected(Exception):
    """Why a sample is left out, in a few words."""


def scan(tar: Path) -> ShardIndex:
    """Read the headers of `tar`, look at each sample's head and tail, and return the usable ones."""
    stamp = file_stamp(tar)
    members, notes = _members(tar)
    rows, keys, rejected = [], [], list(notes)
    with open(tar, "rb", buffering=0) as file:
        for key, parts in members.items():
            try:
                rows.append(_check_sample(file.fileno(), parts))
                keys.append(key.encode("utf-8", "surrogateescape"))
            except _Rejected as reason:
                rejected.append((key, str(reason)))
    table = np.array(rows, dtype=np.int64).reshape(len(rows), 6).T
    key_end = np.cumsum([len(key) for key in keys], dtype=np.int64)
    return ShardIndex(tar, stamp, *table, key_end, b"".join(keys), tuple(rejected))


def file_stamp(tar: Path) -> tuple[int, int, int]:
    """What must be unchanged for a stored index to be used."""
    status = tar.stat()
    return VERSION, status.st_size, status.st_mtime_ns


def _members(tar: Path) -> tuple[dict[str, dict[str, tuple[int, int]]], list[tuple[str, str]]]:
    """Group the regular members of a tar as {key: {"image" | "caption": (offset, size)}}, plus complaints."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    notes = []
    size = tar.stat().st_size
    try:
        with tarfile.open(tar, "r:") as archive:
            try:
                for member in _forward(archive):
                    complaint = _file_member(member, size, samples)
                    if complaint:
                        notes.append(complaint)
            except _TAR_ERRORS as error:
                notes.append((tar.name, f"the tar is cut short ({error})"))
            notes += _damage(tar, archive.offset, size)
    except _TAR_ERRORS:
        if size == 0:
            raise UserError(f"{tar}: the shard is empty; delete or download it again") from None
        raise UserError(f"{tar}: not an uncompressed tar; unpack it or download it again") from None
    return samples, notes


def _forward(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of a tar; a header whose size leads backwards would otherwise be read for ever."""
    end = -1
    for member in archive:
        archive.members.clear()  # a shard has tens of thousands; they are not needed again
        if member.size < 0 or archive.offset <= end:
            raise tarfile.ReadError("a header points backwards")
        end = archive.offset
        yield member


def _file_member(member: tarfile.TarInfo, tar_size: int, samples: dict) -> tuple[str, str] | None:
    """Add one member to `samples`; return (key, reason) when it has to be left out with a word."""
    key, _, extension = member.name.rpartition(".")
    extension = extension.lower()
    kind = _KINDS.get(extension)
    if kind is None or not member.isfile() or member.issparse() or key.rpartition("/")[2].startswith("."):
        return None
    if member.offset_data + member.size > tar_size:
        return key, "cut off by the end of the tar"
    parts = samples.setdefault(key, {})
    if kind in parts:
        return key, f"second {kind} of the same name ignored"
    parts[kind] = (member.offset_data, member.size)
    return None


def _damage(tar: Path, offset: int, size: int) -> list[tuple[str, str]]:
    """tarfile stops silently at a broken header; a well-formed end is zeros up to the end of the file."""
    with open(tar, "rb") as file:
        file.seek(min(offset, size))
        block = file.read(512)
    if block.strip(b"\0"):
        return [(tar.name, f"damaged header near byte {offset}: the samples after it are lost")]
    return []


def _check_sample(handle: int, parts: dict[str, tuple[int, int]]) -> tuple[int, ...]:
    """Return (image offset, size, caption offset, size, width, height) or raise _Rejected."""
    if "image" not in parts:
        raise _Rejected("no image")
    if "caption" not in parts:
        raise _Rejected("no caption")
    offset, size = parts["caption"]
    caption = os.pread(handle, min(size, MAX_CAPTION_BYTES), offset).decode("utf-8", "replace")
    if not clean(caption):
        raise _Rejected("empty caption")
    return *parts["image"], offset, size, *_check_image(handle, *parts["image"])


def _check_image(handle: int, offset: int, size: int) -> tuple[int, int]:
    if size == 0:
        raise _Rejected("empty image")
    head = os.pread(handle, min(size, _HEAD_BYTES), offset)
    try:
        kind, width, height = probe_size(head)
    except ValueError as error:
        if size <= _HEAD_BYTES:
            raise _Rejected(str(error)) from None
        try:  # a long colour profile, or WebP, may need the whole file
            kind, width, height = probe_size(os.pread(handle, size, offset))
        except ValueError as second_error:
            raise _Rejected(str(second_error)) from None
    if width * height > MAX_PIXELS:
        raise _Rejected(f"{width} x {height} pixels is above the limit of {MAX_PIXELS}")
    if kind in _END_MARKERS:  # DALI refuses a truncated file and loses the whole batch with it
        tail = os.pread(handle, min(size, _TAIL_BYTES), offset + max(0, size - _TAIL_BYTES))
        if _END_MARKERS[kind] not in tail:
            raise _Rejected(f"truncated {kind} (no end marker)")
    return width, height
