"""The file of a shard index: where it lies, and what is in it.

A NumPy archive, about 40 bytes a sample: offsets in blocks of 512 bytes, every column in the smallest type
that holds it. It is written whole or not at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np

from groupvit_fast.console import write_bytes_atomically
from groupvit_fast.data.index_nouns import noun_arrays, read_nouns
from groupvit_fast.data.parsing import PARSING
from groupvit_fast.data.scan import COLUMNS, ShardIndex

_BLOCK = 512
_OFFSETS = ("image_offset", "caption_offset")


def index_places(tar: Path, cache_dir: Path | None) -> list[Path]:
    """Where the index of `tar` may lie, best first: `cache_dir`, or beside the tar and the user's cache."""
    tar = tar.absolute()
    hashed = f"{tar.name}-{hashlib.sha256(os.fsencode(tar)).hexdigest()[:16]}.index.npz"
    if cache_dir is not None:
        return [Path(cache_dir) / hashed]
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [tar.with_name(tar.name + ".index.npz"), user_cache / "groupvit_fast" / "index" / hashed]


def store_index(index: ShardIndex, cache_dir: Path | None) -> Path | None:
    """Write the index to the first place that is writable; None when there is none."""
    arrays = {name: getattr(index, name) for name in COLUMNS}
    for name in _OFFSETS:
        arrays[name] = arrays[name] // _BLOCK
    arrays["key_size"] = np.diff(index.key_end, prepend=0)
    arrays |= noun_arrays(index.nouns) if index.nouns else {}
    arrays = {name: _smallest(values) for name, values in arrays.items()}
    arrays["key_bytes"] = np.frombuffer(index.key_bytes, np.uint8)
    about = {"stamp": index.stamp, "verified": index.verified, "rejected": index.rejected}
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    for path in index_places(index.tar, cache_dir):
        try:
            write_bytes_atomically(path, buffer.getvalue())
            return path
        except OSError:
            continue
    return None


def load_index(path: Path, tar: Path) -> ShardIndex | None:
    """The index stored at `path`, of whatever state of the tar; None when it is absent or damaged."""
    try:
        # opened here, because np.load leaves a damaged file open
        with PARSING, open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        about = json.loads(arrays["about"].tobytes())
        columns = {name: arrays[name].astype(np.int64) for name in COLUMNS}
        for name in _OFFSETS:
            columns[name] *= _BLOCK
        return ShardIndex(
            tar,
            tuple(about["stamp"]),
            **columns,
            key_end=np.cumsum(arrays["key_size"], dtype=np.int64),
            key_bytes=arrays["key_bytes"].tobytes(),
            rejected=tuple((key, reason) for key, reason in about["rejected"]),
            verified=about["verified"],
            nouns=read_nouns(arrays),
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def _smallest(values: np.ndarray) -> np.ndarray:
    if len(values) and values.min() < 0:
        return values
    return values.astype(np.min_scalar_type(int(values.max()) if len(values) else 0))
