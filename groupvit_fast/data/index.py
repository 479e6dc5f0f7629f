"""The shard index, stored beside the tars or in the user's cache, and the naming of shards."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from braceexpand import UnbalancedBracesError, braceexpand
from tqdm import tqdm

from groupvit_fast.console import UserError, write_bytes_atomically
from groupvit_fast.data.scan import COLUMNS, ShardIndex, file_stamp, scan

_COLUMNS = (*COLUMNS, "key_end")


def expand_shards(spec: str | Path | Sequence[str | Path]) -> list[Path]:
    """Turn folders, globs, brace patterns {000000..000012} and plain paths into existing tar paths.

    Several patterns may be joined by "::". Anything that is missing or matches nothing is a UserError.
    """
    items = [spec] if isinstance(spec, (str, Path)) else list(spec)
    patterns = [part for item in items for part in str(item).split("::") if part]
    shards = [shard for pattern in patterns for shard in _expand_one(pattern)]
    if not shards:
        raise UserError(
            "no shards given; name tar files, a folder or a pattern like data/{000000..000012}.tar"
        )
    missing = [str(shard) for shard in shards if not shard.is_file()]
    if missing:
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise UserError(f"missing shards: {names}; correct the path or the range in braces")
    return shards


def _expand_one(pattern: str) -> list[Path]:
    if pattern.startswith("pipe:") or "://" in pattern:
        raise UserError(f"{pattern}: remote shards cannot be read; copy them to a local folder first")
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
        if not found:
            raise UserError(f"{path}: the folder holds no .tar file; point to the folder with the shards")
        return found
    if path.exists():
        return [path]
    try:
        names = list(braceexpand(str(path)))
    except UnbalancedBracesError:
        raise UserError(f"{pattern}: the braces do not match; write a range as {{000000..000012}}") from None
    shards: list[Path] = []
    for name in names:
        found = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
        if not found:
            raise UserError(f"{name}: matches no file; check the folder and the pattern")
        shards += map(Path, found)
    return shards


def write_index(tar: str | Path, cache_dir: Path | None = None) -> Path | None:
    """Scan `tar` and store its index; returns the index path, or None when no place is writable.

    The place is `cache_dir` when given, else beside the tar, else the user's cache folder.
    """
    return _store(scan(Path(tar)), cache_dir)


def read_index(tar: str | Path, cache_dir: Path | None = None) -> ShardIndex:
    """The index of `tar`: the stored one while the tar's size and time are unchanged, else a new scan."""
    tar = Path(tar)
    for path in _places(tar, cache_dir):
        index = _load(path, tar)
        if index is not None:
            return index
    index = scan(tar)
    _store(index, cache_dir)
    return index


def read_indexes(
    tars: Sequence[Path], cache_dir: Path | None = None, quiet: bool = False
) -> list[ShardIndex]:
    """Indexes of many shards, with a progress bar on a terminal when it takes a while."""
    bar: Iterable[Path] = tqdm(tars, "index", unit="shard", delay=2, disable=True if quiet else None)
    return [read_index(tar, cache_dir) for tar in bar]


def _places(tar: Path, cache_dir: Path | None) -> list[Path]:
    tar = tar.absolute()
    hashed = f"{tar.name}-{hashlib.sha256(os.fsencode(tar)).hexdigest()[:16]}.index.npz"
    if cache_dir is not None:
        return [Path(cache_dir) / hashed]
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [tar.with_name(tar.name + ".index.npz"), user_cache / "groupvit_fast" / "index" / hashed]


def _store(index: ShardIndex, cache_dir: Path | None) -> Path | None:
    buffer = io.BytesIO()
    arrays = {name: getattr(index, name) for name in _COLUMNS}
    arrays["key_bytes"] = np.frombuffer(index.key_bytes, np.uint8)
    about = {"stamp": index.stamp, "rejected": index.rejected}
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez(buffer, **arrays)
    for path in _places(index.tar, cache_dir):
        try:
            write_bytes_atomically(path, buffer.getvalue())
            return path
        except OSError:
            continue
    return None


def _load(path: Path, tar: Path) -> ShardIndex | None:
    """The stored index, or None when it is absent, damaged or older than the tar."""
    try:
        # opened here, because np.load leaves a damaged file open
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            about = json.loads(stored["about"].tobytes())
            stamp = tuple(about["stamp"])
            if stamp != file_stamp(tar):
                return None
            columns = {name: stored[name] for name in _COLUMNS}
            key_bytes = stored["key_bytes"].tobytes()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    rejected = tuple((key, reason) for key, reason in about["rejected"])
    return ShardIndex(tar, stamp, key_bytes=key_bytes, rejected=rejected, **columns)


def write_dali_index(index: ShardIndex, path: str | Path) -> None:
    """Write the text index that DALI's own `fn.readers.webdataset` reads, for other programs.

    Names become running numbers: DALI splits the lines at white space, so a key with a space would break one.
    """
    columns = (index.image_offset, index.image_size, index.caption_offset, index.caption_size)
    rows = enumerate(zip(*(column.tolist() for column in columns), strict=True))
    lines = [f"jpg {a} {b} {n}.jpg txt {c} {d} {n}.txt" for n, (a, b, c, d) in rows]
    write_bytes_atomically(Path(path), "\n".join([f"v1.2 {len(lines)}", *lines, ""]).encode())
