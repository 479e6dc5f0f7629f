"""The members of a tar file that may be damaged anywhere; csrc/shard_tar.cpp in Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from groupvit_fast.data.probe import FileSlice

_BLOCK = 512
_MOST_EXTENDED = 1 << 20  # bytes of a long name or pax header; more is damage
_MOST_SIZE = 1 << 60


class TarMember(NamedTuple):
    """A regular file in a tar."""

    name: bytes
    offset: int  # of its data
    size: int
    cut: bool  # the data goes on behind the end of the file


class _Header(NamedTuple):
    name: bytes
    size: int
    type: bytes
    sparse_goes_on: bool


@dataclass
class _Extension:
    """What extended headers say about the member behind them. The first word counts."""

    name: bytes | None = None
    size: int | None = None
    unusable: bool = False  # sparse, or its name is lost


def walk_tar(file: FileSlice, member: Callable[[TarMember], None], damage: Callable[[str], None]) -> bool:
    """Call `member` for each regular file of a ustar, GNU or pax tar, and `damage` with what is wrong.

    Links, folders and devices are passed over. A damaged header is reported, and the walk goes on at the
    next block that is a sound header. Returns False when the file holds no header at all and is not just
    zeros: it is no tar.
    """
    return _Walk(file, member, damage).run()


class _Walk:
    def __init__(self, file: FileSlice, member: Callable[[TarMember], None], damage: Callable[[str], None]):
        self.file, self.member, self.damage = file, member, damage
        self.offset: int | None = 0  # None: the end was found
        self.found = self.zeros = False
        self.extension = _Extension()

    def run(self) -> bool:
        while self.offset is not None and self.offset + _BLOCK <= self.file.size:
            block = self.file.view(self.offset, _BLOCK)
            if not block.strip(b"\0"):
                self._skip_zeros()
            elif (header := _read_header(block)) is not None:
                self.found = True
                self._step(header)
            else:
                self._lost(f"damaged header near byte {self.offset}")
                self._resume()
        if self.offset is not None and self.offset < self.file.size:
            self.damage("the tar is cut short in a header")
        if self.offset == self.file.size and self.found:
            self.damage("no end mark: the tar may be cut short")
        return self.found or self.zeros

    def _skip_zeros(self) -> None:
        start = self.offset
        for offset in range(start, self.file.size, _BLOCK):
            if self.file.view(offset, _BLOCK).strip(b"\0"):
                self._lost(f"zeros from byte {start} to {offset}")
                self.offset = offset
                return
        self.offset, self.zeros = None, True

    def _resume(self) -> None:
        """Go to the next block that is a sound header."""
        for offset in range(self.offset + _BLOCK, self.file.size - _BLOCK + 1, _BLOCK):
            if _read_header(self.file.view(offset, _BLOCK)) is not None:
                self.offset = offset
                return
        self.offset = None

    def _lost(self, what: str) -> None:
        self.damage(what)
        self.extension = _Extension()

    def _step(self, header: _Header) -> None:
        if header.type in (b"x", b"X", b"L", b"K"):
            self._extend(header)
        elif header.type == b"g":
            self.offset += _BLOCK + _whole_blocks(header.size)
        elif header.type in (b"1", b"2", b"3", b"4", b"5", b"6"):
            self.extension = _Extension()
            self.offset += _BLOCK
        else:
            self._data_member(header)

    def _extend(self, header: _Header) -> None:
        data = self.offset + _BLOCK
        if header.size > _MOST_EXTENDED or data + header.size > self.file.size:
            self._lost(f"damaged header near byte {self.offset}")
            self.extension.unusable = True
            self.offset += _BLOCK
            return
        text = self.file.view(data, header.size)
        if header.type == b"L":
            if self.extension.name is None:
                self.extension.name = _until_nul(text)
        elif header.type != b"K" and not _read_pax(text, self.extension):
            self._lost(f"damaged header near byte {self.offset}")
            self.extension.unusable = True
        self.offset = data + _whole_blocks(header.size)

    def _data_member(self, header: _Header) -> None:
        extension, self.extension = self.extension, _Extension()
        name = header.name if extension.name is None else extension.name
        size = header.size if extension.size is None else extension.size
        offset = self.offset + _BLOCK
        if header.type == b"S":  # its map of holes may go on in more blocks
            more = header.sparse_goes_on
            while more:
                block = self.file.view(offset, _BLOCK)
                more = len(block) == _BLOCK and block[504] != 0
                offset += _BLOCK
        cut = size > self.file.size - offset
        regular = header.type in (b"0", b"\0", b"7") and not extension.unusable
        regular = regular and bool(name) and not name.endswith(b"/")
        if regular:
            self.member(TarMember(name, offset, size, cut))
        if not cut:
            self.offset = min(offset + _whole_blocks(size), self.file.size)
            return
        if not regular:
            self.damage("cut off by the end of the tar")
        self._resume()


def _whole_blocks(size: int) -> int:
    return (size + _BLOCK - 1) // _BLOCK * _BLOCK


def _until_nul(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _read_header(block: bytes) -> _Header | None:
    total = _header_number(block[148:156])
    if total is None:
        return None
    others = block[:148] + b" " * 8 + block[156:]
    plain = sum(others)
    with_sign = plain - 256 * sum(byte > 127 for byte in others)  # old programs added up signed bytes
    size = _header_number(block[124:136])
    if total not in (plain, with_sign) or size is None:
        return None
    name, prefix = _until_nul(block[:100]), _until_nul(block[345:500])
    if block[257:263] == b"ustar\0" and prefix:
        name = prefix + b"/" + name
    return _Header(name, size, block[156:157], block[482] != 0)


def _header_number(field: bytes) -> int | None:
    """A number of a header: octal digits, or base 256 when the first byte is 0x80."""
    if field[0] == 0x80:
        value = int.from_bytes(field[1:], "big")
        return value if value <= _MOST_SIZE else None
    digits = field.lstrip(b" ").partition(b"\0")[0].partition(b" ")[0]
    if digits.strip(b"01234567"):
        return None
    return int(digits or b"0", 8)


def _read_pax(records: bytes, extension: _Extension) -> bool:
    """Records of "length key=value\\n"; False when one is malformed."""
    while records and records[0]:
        digits, space, _ = records.partition(b" ")
        length = _decimal(digits) if space else None
        if length is None or length > len(records) or length < len(digits) + 3:
            return False
        record = records[len(digits) + 1 : length]
        key, equals, value = record.partition(b"=")
        if not equals or not record.endswith(b"\n"):
            return False
        value = value[:-1]
        if key == b"path" and extension.name is None:
            extension.name = value
        if key == b"size" and extension.size is None:
            extension.size = _decimal(value)
            if extension.size is None or extension.size > _MOST_SIZE:
                return False
        if key.startswith(b"GNU.sparse."):
            extension.unusable = True
        records = records[length:]
    return True


def _decimal(digits: bytes) -> int | None:
    """Up to 18 ASCII digits."""
    return int(digits) if 0 < len(digits) <= 18 and not digits.strip(b"0123456789") else None
