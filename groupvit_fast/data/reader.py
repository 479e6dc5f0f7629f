"""All samples of a list of shards under one numbering, read by number."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import resource
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from groupvit_fast.console import UserError
from groupvit_fast.data.index import read_indexes
from groupvit_fast.data.index_files import index_places, load_index
from groupvit_fast.data.remote import MissingShard, ShardCache, is_remote
from groupvit_fast.data.scan import MAX_CAPTION_BYTES, VERSION, ShardIndex, file_stamp

_log = logging.getLogger("groupvit_fast")
_DOWNLOADS = 4  # at a time


class SampleReader:
    """Reads images and captions by sample number 0 .. len-1; one thread at a time.

    Plain reads, not a memory map: a shard that is rewritten meanwhile gives an error instead of killing the
    process. Samples can be quarantined; `usable` then puts the next good one in their place.

    A shard given as a URL is downloaded into `cache`, now and whenever the cache has dropped it. One that
    does not exist is an error, or left out with a warning if `allow_missing`.
    """

    def __init__(
        self,
        shards: Sequence[Path | str],
        cache_dir: Path | None = None,
        quiet: bool = False,
        *,
        cache: ShardCache | None = None,
        allow_missing: bool = False,
    ):
        self.cache = cache
        self.indexes: list[ShardIndex] = []
        self.shards: list[Path | str] = []
        self.given: list[int] = []  # place of each shard in the list that was given
        for place, index in enumerate(_indexes(shards, cache_dir, quiet, cache, allow_missing)):
            if index is not None:
                self.indexes.append(index)
                self.shards.append(shards[place])
                self.given.append(place)
        self.shard_start = np.cumsum([0, *map(len, self.indexes)])
        self.image_offset = self._column("image_offset")
        self.image_size = self._column("image_size")
        self.caption_offset = self._column("caption_offset")
        self.caption_size = np.minimum(self._column("caption_size"), MAX_CAPTION_BYTES)
        self.width = self._column("width")
        self.height = self._column("height")
        self._bad = np.zeros(len(self), dtype=bool)
        self._handles: OrderedDict[int, int] = OrderedDict()
        self._fetcher: ThreadPoolExecutor | None = None
        self._coming: dict[int, Future] = {}
        self._max_handles = max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)

    def _column(self, name: str) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *(getattr(index, name) for index in self.indexes)])

    def __len__(self) -> int:
        return int(self.shard_start[-1])

    @cached_property
    def shard_bytes(self) -> np.ndarray:
        """Size of each shard's file, int64."""
        return np.array([index.stamp[1] for index in self.indexes], np.int64)

    @property
    def window(self) -> int | None:
        """Bytes of shards that may be needed at the same time, where the cache does not hold them all.

        Half of the cache: the next window arrives while samples of this one are still on their way.
        """
        remote = [is_remote(shard) for shard in self.shards]
        limit = self.cache.limit if self.cache else None
        return limit // 2 if limit is not None and self.shard_bytes[remote].sum() > limit else None

    @cached_property
    def fingerprint(self) -> str:
        """A short hash that changes when the samples or their order do, but not when the files move."""
        digest = hashlib.sha256()
        for column in (self.image_offset, self.image_size, self.caption_size):
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()[:16]

    def name(self, sample: int) -> str:
        """Where a sample lies, for messages: path of the tar, a colon, its key."""
        shard = int(self.shard_of(sample))
        index = self.indexes[shard]
        return f"{self.shards[shard]}:{index.key(sample - int(self.shard_start[shard]))}"

    def shard_of(self, samples: np.ndarray) -> np.ndarray:
        """The number of the shard that each sample lies in."""
        return np.searchsorted(self.shard_start, samples, side="right") - 1

    def quarantine(self, sample: int) -> None:
        """Never deliver `sample` again."""
        self._bad[sample] = True

    @property
    def quarantined(self) -> list[int]:
        return np.flatnonzero(self._bad).tolist()

    def usable(self, samples: np.ndarray) -> np.ndarray:
        """`samples` with each quarantined one replaced by the next good one in the numbering."""
        if self._bad.all():
            raise UserError("every sample of the shards is unreadable; run the shard check on them")
        samples = samples.copy()
        while (bad := self._bad[samples]).any():
            samples[bad] = (samples[bad] + 1) % len(self)
        return samples

    def read(self, samples: np.ndarray) -> tuple[list[np.ndarray], list[str]]:
        """Encoded images (uint8 arrays) and raw captions of `samples`."""
        places = self._places(samples, self.image_offset, self.image_size)
        for shard, offset, size in places:  # announce all before the first read: the disk works in parallel
            os.posix_fadvise(self._handle(shard), offset, size, os.POSIX_FADV_WILLNEED)
        return [np.frombuffer(self._pread(*place), np.uint8) for place in places], self.captions(samples)

    def captions(self, samples: np.ndarray) -> list[str]:
        """Raw captions of `samples`; bytes that are not UTF-8 become replacement characters."""
        places = self._places(samples, self.caption_offset, self.caption_size)
        return [self._pread(*place).decode("utf-8", "replace") for place in places]

    def nouns(self, samples: np.ndarray, tags: str) -> list[list[str] | None]:
        """What text.nouns(caption, tags) returns for each sample, where the index of its shard has it."""
        shards = np.searchsorted(self.shard_start, samples, side="right") - 1
        found: list[list[str] | None] = []
        for shard, sample in zip(shards.tolist(), (samples - self.shard_start[shards]).tolist(), strict=True):
            stored = self.indexes[shard].nouns
            found.append(stored.of(sample) if stored is not None and stored.tags == tags else None)
        return found

    def close(self) -> None:
        if self._fetcher is not None:
            self._fetcher.shutdown(cancel_futures=True)
            self._fetcher = None
        while self._handles:
            os.close(self._handles.popitem()[1])

    def _places(
        self, samples: np.ndarray, offset: np.ndarray, size: np.ndarray
    ) -> list[tuple[int, int, int]]:
        """(shard number, offset, size) of one member of each sample."""
        columns = (self.shard_of(samples), offset[samples], size[samples])
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        data = os.pread(self._handle(shard), size, offset)
        if len(data) != size:
            raise UserError(f"{self.shards[shard]}: became shorter while it was read; restore the shard")
        return data

    def _handle(self, shard: int) -> int:
        """An open file of the shard; the least recently used one is closed at the limit."""
        if shard in self._handles:
            self._handles.move_to_end(shard)
            return self._handles[shard]
        if len(self._handles) >= self._max_handles:
            os.close(self._handles.popitem(last=False)[1])
        handle = self._open(shard)
        self._handles[shard] = handle
        return handle

    def fetch_ahead(self, samples: np.ndarray) -> None:
        """Download the shards of `samples` in the background; what fails is tried again when it is read."""
        for shard in np.unique(self.shard_of(samples)).tolist():
            url = self.shards[shard]
            if is_remote(url) and shard not in self._coming and not self.cache.path(url).exists():
                self._fetcher = self._fetcher or ThreadPoolExecutor(1, "fetch-shards")
                self._coming[shard] = self._fetcher.submit(self.cache.fetch, url)
                self._coming[shard].add_done_callback(lambda _, shard=shard: self._coming.pop(shard, None))

    def _open(self, shard: int) -> int:
        flags = os.O_RDONLY | os.O_CLOEXEC
        if not is_remote(self.shards[shard]):
            return os.open(self.indexes[shard].tar, flags)
        while True:  # another process may make room between the download and the opening
            with contextlib.suppress(FileNotFoundError):
                path = self.cache.fetch(self.shards[shard])
                if file_stamp(path) != self.indexes[shard].stamp:
                    raise UserError(f"{self.shards[shard]}: changed on its server; start the run again")
                return os.open(path, flags)


def _index_without_shard(cache: ShardCache, url: str, cache_dir: Path | None) -> ShardIndex | None:
    """The stored index of a shard that had to make room in the cache; compared when the shard is read."""
    path = cache.path(url)
    if cache.limit is None or path.exists():
        return None
    stored = (load_index(place, path) for place in index_places(path, cache_dir))
    return next((index for index in stored if index is not None and index.stamp[0] == VERSION), None)


def _indexes(
    shards: Sequence[Path | str],
    cache_dir: Path | None,
    quiet: bool,
    cache: ShardCache | None,
    allow_missing: bool,
) -> list[ShardIndex | None]:
    """The index of each shard, None for one that does not exist; several downloads run at a time."""
    if not any(map(is_remote, shards)):
        return read_indexes(shards, cache_dir, quiet)
    if cache is None:
        raise UserError(
            f"{next(filter(is_remote, shards))}: name a folder for remote shards: --shard-cache DIR"
        )

    def index(shard: Path | str) -> ShardIndex | None:
        if not is_remote(shard):
            return read_indexes([shard], cache_dir, quiet=True)[0]
        if (known := _index_without_shard(cache, shard, cache_dir)) is not None:
            return known
        try:
            while True:  # another download may push this one out before it is indexed
                with contextlib.suppress(FileNotFoundError):
                    return read_indexes([cache.fetch(shard)], cache_dir, quiet=True)[0]
        except MissingShard as error:
            if not allow_missing:
                raise
            _log.warning("left out: %s", error)
            return None

    with ThreadPoolExecutor(_DOWNLOADS) as pool:
        bar = tqdm(total=len(shards), desc="download", unit="shard", delay=2, disable=True if quiet else None)
        with bar:
            found = []
            for result in pool.map(index, shards):
                found.append(result)
                bar.update()
    if not any(result is not None for result in found):
        raise UserError("none of the shards exists; check the URLs")
    return found
