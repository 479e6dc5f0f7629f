"""The nouns of every caption of a shard, found once and kept in its index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

VERSION = 1  # of how nouns are found: stored ones of another version are not used


@dataclass(frozen=True)
class StoredNouns:
    """What text.nouns says of each sample's caption."""

    tags: str  # the name given to text.nouns
    words: tuple[str, ...]  # the different nouns
    numbers: np.ndarray  # places in `words`, sample after sample
    ends: np.ndarray  # int64 [samples]: end of each sample's part of `numbers`

    def of(self, sample: int) -> list[str]:
        """The nouns of a sample, as text.nouns returns them."""
        start = self.ends[sample - 1] if sample else 0
        return [self.words[number] for number in self.numbers[start : self.ends[sample]]]


def pack_nouns(tags: str, found: Sequence[Sequence[str]]) -> StoredNouns:
    """Keep the nouns of each sample, `found`, with every word once."""
    places: dict[str, int] = {}
    numbers = [places.setdefault(word, len(places)) for words in found for word in words]
    ends = np.cumsum([len(words) for words in found], dtype=np.int64)
    return StoredNouns(tags, tuple(places), np.array(numbers, np.int64), ends)


def noun_arrays(nouns: StoredNouns) -> dict[str, np.ndarray]:
    """What a stored index keeps; `read_nouns` is the way back."""
    text = "\n".join([f"{VERSION}", nouns.tags, *nouns.words])
    return {
        "noun_text": np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8),
        "noun_numbers": nouns.numbers,
        "noun_counts": np.diff(nouns.ends, prepend=0),
    }


def read_nouns(arrays: dict[str, np.ndarray]) -> StoredNouns | None:
    """The nouns in a stored index, None when it has none or they were found by another version."""
    if "noun_text" not in arrays:
        return None
    text = arrays["noun_text"].tobytes().decode("utf-8", "surrogatepass")
    version, tags, *words = text.split("\n")
    if version != str(VERSION):
        return None
    ends = np.cumsum(arrays["noun_counts"], dtype=np.int64)
    return StoredNouns(tags, tuple(words), arrays["noun_numbers"].astype(np.int64), ends)
