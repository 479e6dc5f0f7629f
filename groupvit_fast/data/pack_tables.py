"""Samples listed in a table: CSV, TSV, JSON lines or parquet, with paths or with the images themselves."""

from __future__ import annotations

import base64
import binascii
import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from groupvit_fast.console import UserError
from groupvit_fast.data.pack_sources import Item, Skip, bytes_item, file_item

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
IMAGE_COLUMNS = (
    "filepath",
    "file_name",
    "image_path",
    "path",
    "filename",
    "file",
    "image",
    "image_bytes",
    "jpg",
)
CAPTION_COLUMNS = ("caption", "text", "title", "txt")
_MOST_IN_A_FIELD = 1 << 30  # csv's own limit of 128 KB is too small for an image in base64
_ROWS = 256  # of a parquet file at a time


def table_items(
    path: Path, skip: Skip, *, image: str | None = None, caption: str | None = None, in_base64: bool = False
) -> Iterator[Item]:
    """The rows of a table in order; `image` and `caption` name its columns.

    An image is a path, relative to the table's folder, or bytes in a parquet file (also in the form of
    Hugging Face datasets, {"bytes", "path"}), or base64 text when `in_base64` says so.
    """
    rows = _parquet_rows(path, image, caption) if path.suffix == ".parquet" else _text_rows(path)
    columns: tuple[str, str] | None = None
    for number, row in enumerate(rows, 1):
        if columns is None:
            columns = _columns(path, list(row), image, caption)
        value, text = row.get(columns[0]), row.get(columns[1])
        name = f"{path}, row {number}"
        if not value or text is None:
            skip(name, "no image" if not value else "no caption")
            continue
        yield from _row_item(path, name, value, str(text), in_base64, skip)


def _row_item(path: Path, name: str, value: Any, text: str, in_base64: bool, skip: Skip) -> Iterator[Item]:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path") or ""
    if isinstance(value, bytes):
        yield from bytes_item(value, name, text, skip)
    elif in_base64:
        try:
            yield from bytes_item(base64.b64decode(value, validate=True), name, text, skip)
        except (binascii.Error, ValueError):
            skip(name, "not base64")
    else:
        yield from file_item(path.parent / str(value), text, skip)


def _columns(path: Path, found: Sequence[str], image: str | None, caption: str | None) -> tuple[str, str]:
    """Which columns hold image and caption."""
    chosen = []
    for flag, name, usual in (("image", image, IMAGE_COLUMNS), ("caption", caption, CAPTION_COLUMNS)):
        column = next((column for column in ((name,) if name else usual) if column in found), None)
        if column is None:
            raise UserError(f"{path}: has the columns {', '.join(map(str, found))}; choose --{flag}-column")
        chosen.append(column)
    return chosen[0], chosen[1]


def _text_rows(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        if path.suffix in (".csv", ".tsv"):
            csv.field_size_limit(_MOST_IN_A_FIELD)
            yield from csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            return
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.strip() else None
            except ValueError as error:
                raise UserError(f"{path}:{number}: not JSON ({error})") from None
            if isinstance(row, dict):
                yield row
            elif row is not None:
                raise UserError(
                    f"{path}:{number}: expected an object such as {{'path': ..., 'caption': ...}}"
                )


def _parquet_rows(path: Path, image: str | None, caption: str | None) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("parquet files need pyarrow: pip install 'groupvit-fast[parquet]'") from None
    try:
        file = parquet.ParquetFile(path)
        columns = list(_columns(path, file.schema_arrow.names, image, caption))
        for batch in file.iter_batches(batch_size=_ROWS, columns=columns):
            yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a readable parquet file ({error})") from None
