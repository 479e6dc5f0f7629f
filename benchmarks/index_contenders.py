"""Indexing the same shards for the first time: ours, and DALI's wds2idx.

    python benchmarks/index_contenders.py 'shards/{000000..000012}.tar'

Both write their index files; ours also looks at every image and caption.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from groupvit_fast.console import UserError, run_command
from groupvit_fast.data.index import expand_shards, read_indexes


def index_contenders(shards: Sequence[Path]) -> dict[str, Callable[[], None]]:
    """What to time: name and call, each indexing all `shards` from nothing in a folder of its own."""

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            read_indexes(shards, Path(folder), quiet=True)

    def stock() -> None:
        import wds2idx

        with tempfile.TemporaryDirectory() as folder:
            for number, shard in enumerate(shards):
                with wds2idx.IndexCreator(str(shard), f"{folder}/{number}.idx", verbose=False) as creator:
                    creator.create_index()

    return {"ours": ours} | ({"wds2idx": stock} if find_spec("wds2idx") else {})


def main(argv: Sequence[str] | None = None) -> None:
    """Print the best rate of five interleaved turns, in samples a second."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not arguments:
        raise UserError("name the shards to index")
    shards = expand_shards(arguments)
    samples = sum(map(len, read_indexes(shards, quiet=True)))
    contenders = index_contenders(shards)
    best = dict.fromkeys(contenders, float("inf"))
    for _ in range(5):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    for name, seconds in best.items():
        ratio = best["wds2idx"] / seconds if "wds2idx" in best else float("nan")
        print(f"{name:8} {samples / seconds:12,.0f} samples/s  {ratio:6.2f} x wds2idx")


if __name__ == "__main__":
    sys.exit(run_command(main))
