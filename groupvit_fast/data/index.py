"""The shard index, stored beside the tars or in the user's cache, and the naming of shards."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from braceexpand import UnbalancedBracesError, braceexpand
from tqdm import tqdm

from groupvit_fast.console import UserError, write_bytes_atomically
from groupvit_fast.data.index_files import index_places, load_index, store_index
from groupvit_fast.data.remote import is_remote
from groupvit_fast.data.scan import ShardIndex, file_stamp, scan

_T = TypeVar("_T")
_log = logging.getLogger("groupvit_fast")


def expand_shards(
    spec: str | Path | Sequence[str | Path], *, remote: bool = False, allow_missing: bool = False
) -> list[Path | str]:
    """Turn folders, globs, brace patterns {000000..000012} and plain paths into existing tar paths.

    Several patterns may be joined by "::". Anything that is missing or matches nothing is a UserError;
    with `allow_missing`, single shards may be. URLs are kept as strings where `remote` lets them in.
    """
    items = [spec] if isinstance(spec, (str, Path)) else list(spec)
    patterns = [part for item in items for part in str(item).split("::") if part]
    shards = [shard for pattern in patterns for shard in _expand_one(pattern, remote)]
    if not shards:
        raise UserError(
            "no shards given; name tar files, a folder or a pattern like data/{000000..000012}.tar"
        )
    present = [is_remote(shard) or shard.is_file() for shard in shards]
    if not all(present):
        missing = [str(shard) for shard, there in zip(shards, present, strict=True) if not there]
        if allow_missing and len(missing) < len(shards):
            _log.warning("%d of %d shards are missing, first: %s", len(missing), len(shards), missing[0])
            return [shard for shard, there in zip(shards, present, strict=True) if there]
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise UserError(f"missing shards: {names}; correct the path or the range in braces")
    return shards


def _expand_one(pattern: str, remote: bool) -> list[Path | str]:
    if is_remote(pattern) and remote:
        return _braces(pattern)
    if is_remote(pattern) or "://" in pattern:
        raise UserError(f"{pattern}: remote shards cannot be read here; copy them to a local folder first")
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
        if not found:
            raise UserError(f"{path}: the folder holds no .tar file; point to the folder with the shards")
        return found
    if path.exists():
        return [path]
    shards: list[Path | str] = []
    for name in _braces(str(path)):
        found = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
        if not found:
            raise UserError(f"{name}: matches no file; check the folder and the pattern")
        shards += map(Path, found)
    return shards


def _braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand(pattern))
    except UnbalancedBracesError:
        raise UserError(f"{pattern}: the braces do not match; write a range as {{000000..000012}}") from None


def write_index(tar: str | Path, cache_dir: Path | None = None) -> Path | None:
    """Scan `tar` and store its index; returns the index path, or None when no place is writable.

    The place is `cache_dir` when given, else beside the tar, else the user's cache folder.
    """
    return store_index(scan(Path(tar)), cache_dir)


def read_index(tar: str | Path, cache_dir: Path | None = None) -> ShardIndex:
    """The index of `tar`: the stored one while the tar is unchanged, else a new scan, which is stored."""
    tar = Path(tar)
    stamp = file_stamp(tar)
    for path in index_places(tar, cache_dir):
        index = load_index(path, tar)
        if index is not None and index.stamp == stamp:
            return index
        if index is not None and index.stamp[0] == stamp[0]:
            _log.warning("%s: changed since it was indexed; it is indexed again", tar)
    index = scan(tar)
    store_index(index, cache_dir)
    return index


def read_indexes(
    tars: Sequence[Path], cache_dir: Path | None = None, quiet: bool = False
) -> list[ShardIndex]:
    """Indexes of many shards, several at a time, with a progress bar on a terminal when it takes a while.

    Shards that cannot be used are all looked at before one error names them.
    """
    return over_shards(lambda tar: read_index(tar, cache_dir), tars, "index", quiet)


def over_shards(work: Callable[[Path], _T], tars: Sequence[Path], title: str, quiet: bool) -> list[_T]:
    """`work(tar)` of each shard, in threads; the UserErrors of all shards become one."""

    def attempt(tar: Path) -> _T | UserError:
        try:
            return work(tar)
        except UserError as error:
            return error

    with (
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
        closing(pool.map(attempt, tars)) as results,  # closing drops what has not begun
        tqdm(results, title, len(tars), unit="shard", delay=2, disable=True if quiet else None) as bar,
    ):
        done = list(bar)
    errors = [str(result) for result in done if isinstance(result, UserError)]
    if len(errors) > 1:
        more = f" and {len(errors) - 3} more" if len(errors) > 3 else ""
        raise UserError(f"{len(errors)} shards cannot be used: {'; '.join(errors[:3])}{more}")
    if errors:
        raise UserError(errors[0])
    return done


def write_dali_index(index: ShardIndex, path: str | Path) -> None:
    """Write the text index that DALI's own `fn.readers.webdataset` reads, for other programs.

    Names become running numbers: DALI splits the lines at white space, so a key with a space would break one.
    """
    columns = (index.image_offset, index.image_size, index.caption_offset, index.caption_size)
    rows = enumerate(zip(*(column.tolist() for column in columns), strict=True))
    lines = [f"jpg {a} {b} {n}.jpg txt {c} {d} {n}.txt" for n, (a, b, c, d) in rows]
    write_bytes_atomically(Path(path), "\n".join([f"v1.2 {len(lines)}", *lines, ""]).encode())
