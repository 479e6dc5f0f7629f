"""What the indexes of shards say about a dataset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from groupvit_fast.data.scan import ShardIndex


def spread(values: np.ndarray) -> dict[str, float]:
    """Smallest, median, largest and mean; empty for no values."""
    if not len(values):
        return {}
    low, middle, high = np.percentile(values, [0, 50, 100]).tolist()
    return {"min": low, "median": middle, "max": high, "mean": float(np.mean(values))}


def statistics(indexes: Sequence[ShardIndex]) -> dict[str, Any]:
    """Spreads of the sizes, and how many captions are the same byte for byte as an earlier one."""

    def column(name: str) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *(getattr(index, name) for index in indexes)])

    hashes = column("caption_hash")
    _, counts = np.unique(hashes, return_counts=True)
    return {
        "image_bytes": spread(column("image_size")),
        "image_width": spread(column("width")),
        "image_height": spread(column("height")),
        "caption_bytes": spread(column("caption_size")),
        "duplicate_captions": len(hashes) - len(counts),
        "most_of_one_caption": int(counts.max(initial=0)),
    }


def report(indexes: Sequence[ShardIndex]) -> dict[str, Any]:
    """What was left out and why, in total and per shard, and the statistics of the rest."""
    reasons = Counter(reason for index in indexes for _, reason in index.rejected)
    shards = [
        {
            "tar": str(index.tar),
            "samples": len(index),
            "verified": index.verified,
            "nouns": index.nouns.tags if index.nouns else None,
            "rejected": [list(pair) for pair in index.rejected],
        }
        for index in indexes
    ]
    return {
        "samples": sum(map(len, indexes)),
        "rejected": sum(reasons.values()),
        "reasons": dict(reasons.most_common()),
        "statistics": statistics(indexes),
        "shards": shards,
    }
