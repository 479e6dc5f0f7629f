"""The scan of a shard without the compiled module: csrc/shard_scan.cpp in Python."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import numpy as np

from groupvit_fast.data.probe import FileSlice, ImageProbe, probe_image
from groupvit_fast.data.tars import TarMember, walk_tar

_NO_PROBE = ImageProbe(0, 0, "")
_MISSING = (-1, 0)
# Cleaning deletes HTML escapes and terminal codes, but never a letter or digit before the first of them.
_CERTAINLY_TEXT = re.compile(rb"[^&\x1b]*?[0-9A-Za-z]")


@dataclass
class _Sample:
    image: tuple[int, int] = _MISSING  # offset, size
    caption: tuple[int, int] = _MISSING
    probe: ImageProbe = _NO_PROBE
    hash: int = 0
    clear: bool = False  # the caption certainly holds text


class PythonScan:
    """Collects the samples while the tar is walked.

    `kinds` maps an extension in lower case to "image" or "caption". The results are attributes, those of
    scan.RawScan.
    """

    def __init__(self, handle: int, kinds: dict[bytes, str], max_pixels: int, caption_bytes: int):
        self._file = FileSlice(handle, 0, os.fstat(handle).st_size)
        self._kinds, self._max_pixels, self._caption_bytes = kinds, max_pixels, caption_bytes
        self._samples: dict[bytes, _Sample] = {}
        self.notes: list[tuple[bytes, str]] = []
        self.faults: list[tuple[int, str]] = []
        self.unclear: list[int] = []
        self.is_tar = walk_tar(self._file, self._take, lambda what: self.notes.append((b"", what)))
        self.keys = list(self._samples)
        self.table = np.array([*map(self._row, range(len(self.keys)), self._samples.values())], np.int64)

    def _take(self, member: TarMember) -> None:
        key, dot, extension = member.name.rpartition(b".")
        kind = self._kinds.get(extension.lower())
        if not dot or kind is None or member.name.rpartition(b"/")[2].startswith(b"."):
            return
        if member.cut:
            self.notes.append((key, "cut off by the end of the tar"))
            return
        sample = self._samples.setdefault(key, _Sample())
        if getattr(sample, kind) is not _MISSING:
            self.notes.append((key, f"second {kind} of the same name ignored"))
            return
        setattr(sample, kind, (member.offset, member.size))
        if kind == "image":
            image = FileSlice(self._file.handle, member.offset, member.size)
            sample.probe = probe_image(image, self._max_pixels)
        else:
            text = self._file.view(member.offset, min(member.size, self._caption_bytes))
            sample.hash = _fnv1a(text)
            sample.clear = _CERTAINLY_TEXT.match(text) is not None

    def _row(self, number: int, sample: _Sample) -> tuple[int, ...]:
        fault = sample.probe.fault
        if sample.image is _MISSING:
            fault = "no image"
        elif sample.caption is _MISSING:
            fault = "no caption"
        elif not fault and not sample.clear:
            self.unclear.append(number)
        if fault:
            self.faults.append((number, fault))
        return *sample.image, *sample.caption, sample.probe.width, sample.probe.height, sample.hash


def _fnv1a(text: bytes) -> int:
    """FNV-1a of 64 bits, as a signed number."""
    value = 0xCBF29CE484222325
    for byte in text:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >> 63 else value
