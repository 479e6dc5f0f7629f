"""Making the indexes of many shards as good as training wants them: every image decoded, nouns found.

The index of a shard is stored as soon as it is done, so an interrupted command continues where it was.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from groupvit_fast.console import UserError
from groupvit_fast.data import text
from groupvit_fast.data.index import read_indexes
from groupvit_fast.data.index_files import store_index
from groupvit_fast.data.index_nouns import pack_nouns
from groupvit_fast.data.scan import MAX_CAPTION_BYTES, ShardIndex


def prepare_indexes(
    tars: Sequence[Path],
    cache_dir: Path | None = None,
    quiet: bool = False,
    *,
    verify: str = "header",
    nouns: str | None = None,
    exclude: dict[str, set[str]] | None = None,
) -> list[ShardIndex]:
    """Indexes of `tars`, made or completed and stored.

    `verify` = "full" decodes each image and leaves out what cannot be. `nouns` names the tags of text.nouns
    to be found now. `exclude` has keys of samples to leave out, by path of the shard.
    """
    indexes = read_indexes(tars, cache_dir, quiet)
    for number, index in enumerate(indexes):
        unwanted = (exclude or {}).get(str(index.tar.absolute()), set())
        found = {n: "excluded" for n in range(len(index) if unwanted else 0) if index.key(n) in unwanted}
        if found:
            indexes[number] = index.without(found)
            store_index(indexes[number], cache_dir)
    if verify == "full":
        bar = tqdm(indexes, "verify", unit="shard", delay=2, disable=True if quiet else None)
        indexes = [_verified(index, cache_dir) for index in bar]
    return _with_nouns(indexes, nouns, cache_dir, quiet) if nouns else indexes


def read_exclusions(path: Path) -> dict[str, set[str]]:
    """Keys to leave out by absolute path of the shard, from lines of "shard.tar:key"."""
    found: dict[str, set[str]] = defaultdict(set)
    for number, line in enumerate(path.read_text("utf-8", "surrogateescape").split("\n"), 1):
        tar, colon, key = line.partition(".tar:")
        if line and not colon:
            raise UserError(f"{path}:{number}: expected a line such as data/000000.tar:000000017")
        if line:
            found[str(Path(f"{tar}.tar").absolute())].add(key.split("\t")[0])
    return found


def shard_captions(index: ShardIndex) -> list[str]:
    """The raw captions of a shard, cut at MAX_CAPTION_BYTES, in the order of the index."""
    places = zip(index.caption_offset.tolist(), index.caption_size.tolist(), strict=True)
    with open(index.tar, "rb", buffering=0) as file:
        read = [os.pread(file.fileno(), min(size, MAX_CAPTION_BYTES), offset) for offset, size in places]
    return [caption.decode("utf-8", "replace") for caption in read]


def _verified(index: ShardIndex, cache_dir: Path | None) -> ShardIndex:
    if index.verified == "full":
        return index
    from groupvit_fast.data.verify import undecodable_samples  # DALI takes a second to load

    bad = dict.fromkeys(undecodable_samples(index), "cannot be decoded")
    index = replace(index.without(bad) if bad else index, verified="full")
    store_index(index, cache_dir)
    return index


def _with_nouns(
    indexes: list[ShardIndex], tags: str, cache_dir: Path | None, quiet: bool
) -> list[ShardIndex]:
    """The indexes with the nouns of `tags`, found in as many processes as there are cores."""
    text.check_noun_tags(tags)
    missing = [n for n, index in enumerate(indexes) if index.nouns is None or index.nouns.tags != tags]
    bar = tqdm(total=len(missing), desc="nouns", unit="shard", delay=2, disable=True if quiet else None)
    work = [(indexes[n], tags, cache_dir) for n in missing]
    with bar:
        for n, done in zip(missing, _spread(work), strict=True):
            indexes[n] = done
            bar.update()
    return indexes


def _spread(work: list[tuple[ShardIndex, str, Path | None]]) -> Iterator[ShardIndex]:
    """`_find_nouns` of each piece of work, in processes where several shards wait: tagging is pure Python."""
    cores = min(len(os.sched_getaffinity(0)), len(work))
    if cores < 2:
        yield from itertools.starmap(_find_nouns, work)
        return
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_find_nouns, *zip(*work, strict=True))


def _find_nouns(index: ShardIndex, tags: str, cache_dir: Path | None) -> ShardIndex:
    found = [text.nouns(caption, tags) for caption in shard_captions(index)]
    index = replace(index, nouns=pack_nouns(tags, found))
    store_index(index, cache_dir)
    return index
