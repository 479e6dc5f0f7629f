"""What header and end of an encoded image say, without decoding it; csrc/shard_image.cpp in Python."""

from __future__ import annotations

import errno
import os
from typing import NamedTuple

_TAIL = 1024  # where the end marker is looked for first
_MOST_CHUNKS = 4096
# What is found under the name of an image now and then.
_STRANGERS = (
    (b"GIF8", "GIF"), (b"BM", "BMP"), (b"II*\0", "TIFF"), (b"MM\0*", "TIFF"), (b"%PDF", "PDF"),
    (b"PK\3\4", "ZIP"), (b"\x1f\x8b", "gzip"), (b"<!", "HTML"), (b"<html", "HTML"), (b"<HTML", "HTML"),
    (b"<?xml", "XML"), (b"<svg", "SVG"), (b"\0\0\0\x0cjP", "JPEG 2000"),
)  # fmt: skip
_ALONE = {0x01, *range(0xD0, 0xD9)}  # JPEG markers without a length
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class FileSlice:
    """A part of an open file: positions count from its first byte, and nothing outside it can be seen."""

    def __init__(self, handle: int, offset: int, size: int):
        self.handle, self.offset, self.size = handle, offset, size

    def view(self, position: int, count: int) -> bytes:
        """`count` bytes at `position`, fewer only at the end."""
        if position >= self.size or count <= 0:
            return b""
        count = min(count, self.size - position)
        data = os.pread(self.handle, count, self.offset + position)
        if len(data) != count:
            raise OSError(errno.EIO, os.strerror(errno.EIO))  # the file became shorter
        return data


class InMemory:
    """The same for bytes at hand."""

    def __init__(self, data: bytes):
        self.data, self.size = data, len(data)

    def view(self, position: int, count: int) -> bytes:
        return self.data[position : position + max(count, 0)]


class ImageProbe(NamedTuple):
    """What the header says."""

    width: int  # of the upright picture, as EXIF turns it
    height: int
    fault: str  # why the image cannot be used; empty when it can


class _Damaged(Exception):
    """The header of an image of this kind makes no sense."""


def probe_image(image: FileSlice | InMemory, max_pixels: int) -> ImageProbe:
    """Look at a JPEG, PNG or WebP file."""
    head = image.view(0, 64)
    try:
        if not head:
            return ImageProbe(0, 0, "empty image")
        if head.startswith(b"\xff\xd8\xff"):
            probe = _probe_jpeg(image)
        elif head.startswith(b"\x89PNG\r\n\x1a\n"):
            probe = _probe_png(image)
        elif head.startswith(b"RIFF") and head[8:12] == b"WEBP":
            probe = _probe_webp(image)
        else:
            return ImageProbe(0, 0, _stranger(head))
    except _Damaged as kind:
        return ImageProbe(0, 0, f"damaged {kind} header")
    width, height, fault = probe
    if not fault and width * height > max_pixels:
        fault = f"{width} x {height} pixels is above the limit of {max_pixels}"
    return ImageProbe(width, height, fault)


def _stranger(head: bytes) -> str:
    text = head.lstrip(b" \t\r\n") or head
    for start, name in _STRANGERS:
        if text.startswith(start):
            return f"{name} file, not a JPEG, PNG or WebP image"
    return "not a JPEG, PNG or WebP image"


def _probe_jpeg(image: FileSlice) -> ImageProbe:
    width = height = exif = 0
    position = 2
    while True:
        head = image.view(position, 4)
        if len(head) < 4 or head[0] != 0xFF:
            raise _Damaged("JPEG")
        marker = head[1]
        if marker == 0xFF or marker in _ALONE:
            position += 1 if marker == 0xFF else 2  # 0xFF: a fill byte
            continue
        length = int.from_bytes(head[2:], "big")
        if length < 2 or marker in (0xD9, 0):
            raise _Damaged("JPEG")
        if marker == 0xDA:
            break
        if marker in _FRAMES and not width:
            frame = image.view(position + 5, 4)
            if len(frame) < 4:
                raise _Damaged("JPEG")
            height, width = int.from_bytes(frame[:2], "big"), int.from_bytes(frame[2:], "big")
        if marker == 0xE1 and not exif:
            block = image.view(position + 4, length - 2)
            if block.startswith(b"Exif\0\0"):
                exif = _exif_orientation(block)
        position += 2 + length
    if not width or not height:
        raise _Damaged("JPEG")
    fault = "" if _has_end(image, b"\xff\xd9", position) else "truncated JPEG (no end marker)"
    return _turned(width, height, exif, fault)


def _probe_png(image: FileSlice) -> ImageProbe:
    head = image.view(8, 16)
    width, height = int.from_bytes(head[8:12], "big"), int.from_bytes(head[12:16], "big")
    if len(head) < 16 or head[4:8] != b"IHDR" or not width or not height:
        raise _Damaged("PNG")
    exif, position = 0, 8
    for _ in range(_MOST_CHUNKS):
        chunk = image.view(position, 8)
        if exif or len(chunk) < 8 or chunk[4:] == b"IDAT":
            break
        length = int.from_bytes(chunk[:4], "big")
        if chunk[4:] == b"eXIf":
            exif = _exif_orientation(image.view(position + 8, length))
        position += 12 + length
    ended = _has_end(image, b"IEND", 33, 4)
    return _turned(width, height, exif, "" if ended else "truncated PNG (no end marker)")


def _probe_webp(image: FileSlice) -> ImageProbe:
    head = image.view(0, 30)
    if len(head) < 30:
        raise _Damaged("WebP")
    width, height = _webp_size(head)
    if int.from_bytes(head[4:8], "little") + 8 > image.size:
        return ImageProbe(width, height, "truncated WebP (shorter than it says)")
    exif, position = 0, 12
    for _ in range(_MOST_CHUNKS):
        chunk = image.view(position, 8)
        if exif or len(chunk) < 8:
            break
        length = int.from_bytes(chunk[4:], "little")
        if chunk[:4] == b"EXIF":
            exif = _exif_orientation(image.view(position + 8, length))
        position += 8 + length + (length & 1)
    return _turned(width, height, exif, "")


def _webp_size(head: bytes) -> tuple[int, int]:
    def number(start: int, end: int) -> int:
        return int.from_bytes(head[start:end], "little")

    width = height = 0
    if head[12:16] == b"VP8X":
        width, height = number(24, 27) + 1, number(27, 30) + 1
    elif head[12:16] == b"VP8L" and head[20] == 0x2F:
        bits = number(21, 25)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif head[12:16] == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = number(26, 28) & 0x3FFF, number(28, 30) & 0x3FFF
    if not width or not height:
        raise _Damaged("WebP")
    return width, height


def _has_end(image: FileSlice, marker: bytes, earliest: int, more: int = 0) -> bool:
    """Whether `marker` stands behind `earliest`, with at least `more` bytes after it."""
    end = image.size - more
    start = max(earliest, end - _TAIL)
    if marker in image.view(start, end - start):
        return True
    # Garbage behind the end is harmless; how much there is only a look at the whole file tells.
    return start > earliest and marker in image.view(earliest, end - earliest)


def _turned(width: int, height: int, exif: int, fault: str) -> ImageProbe:
    # DALI turns the picture upright while decoding, so the index counts pixels of the upright one.
    return ImageProbe(height, width, fault) if exif >= 5 else ImageProbe(width, height, fault)


def _exif_orientation(block: bytes) -> int:
    """The orientation 1 to 8 of an EXIF block, 0 when it has none."""
    tiff = block.removeprefix(b"Exif\0\0")
    if len(tiff) < 8 or not tiff.startswith((b"II*\0", b"MM\0*")):
        return 0

    def number(start: int, size: int) -> int:
        return int.from_bytes(tiff[start : start + size], "little" if tiff[0] == ord("I") else "big")

    directory = number(4, 4)
    if directory + 2 > len(tiff):
        return 0
    for entry in range(directory + 2, directory + 2 + 12 * number(directory, 2), 12):
        if entry + 12 > len(tiff):
            return 0
        if number(entry, 2) == 0x0112:
            value = number(entry + 8, 2)
            return value if number(entry + 2, 2) == 3 and value <= 8 else 0
    return 0
