"""Command line for webdataset shards: pack images and captions, index, check, count.

python -m groupvit_fast.shards pack photos/ shards/
python -m groupvit_fast.shards check 'shards/{000000..000012}.tar' --decode
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from groupvit_fast.console import UserError, run_command, write_json

_SHARDS_HELP = "tar files, folders, globs or patterns such as 'data/{000000..000012}.tar'"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; `check` returns 1 when any sample is unusable."""
    arguments = _parser().parse_args(argv)
    try:
        result, status = arguments.run(arguments)
    except RuntimeError as error:  # a library that gives up says so in its last line
        raise UserError(str(error).strip().splitlines()[-1]) from error
    if arguments.json:
        write_json(arguments.json, result)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m groupvit_fast.shards",
        description="Make and inspect webdataset tar shards of image-caption pairs.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        added.add_argument("--json", metavar="FILE", type=Path, help="also write the result as JSON to FILE")
        added.add_argument("--quiet", action="store_true", help="no progress bar")
        return added

    pack = command("pack", _pack, "write tar shards from a folder of images with .txt captions beside them")
    pack.add_argument("source", metavar="SRC", type=Path, help="folder, searched with its subfolders")
    pack.add_argument("output", metavar="OUT", type=Path, help="folder for 000000.tar, 000001.tar, ...")
    pack.add_argument("--per-shard", metavar="N", type=int, default=10_000, help="samples a shard (10000)")

    index = command("index", _index, "find the usable samples of each shard and store them for training")
    index.add_argument("--dali", action="store_true", help="also write TAR.idx for DALI's webdataset reader")
    check = command("check", _check, "list every sample that training would leave out, and why")
    check.add_argument("--decode", action="store_true", help="decode every image, not only look at its ends")
    stats = command("stats", _stats, "count samples, sizes of images and lengths of captions")
    for added in (index, check, stats):
        added.add_argument("shards", metavar="SHARDS", nargs="+", help=_SHARDS_HELP)
        added.add_argument("--cache-dir", metavar="DIR", type=Path, help="where the indexes are kept")
    return parser


def _pack(arguments: argparse.Namespace) -> tuple[dict, int]:
    from groupvit_fast.data.index import read_indexes
    from groupvit_fast.data.shards import pairs_of_folder, write_shards

    pairs = tqdm(pairs_of_folder(arguments.source), "pack", unit="image", disable=_no_bar(arguments))
    shards = write_shards(pairs, arguments.output, samples_per_shard=arguments.per_shard)
    if not shards:
        raise UserError(f"{arguments.source}: no image with a caption in a .txt file beside it was found")
    usable = sum(map(len, read_indexes(shards, quiet=arguments.quiet)))
    print(f"{usable} usable samples in {len(shards)} shards: {shards[0]} ... {shards[-1]}")
    return {"shards": [str(shard) for shard in shards], "samples": usable}, 0


def _index(arguments: argparse.Namespace) -> tuple[dict, int]:
    from groupvit_fast.data.index import write_dali_index

    indexes = _read(arguments)
    if arguments.dali:
        for index in indexes:
            write_dali_index(index, index.tar.with_suffix(".idx"))
    return _report(indexes), 0


def _check(arguments: argparse.Namespace) -> tuple[dict, int]:
    indexes = _read(arguments)
    undecodable = _undecodable(indexes, arguments) if arguments.decode else []
    for index in indexes:
        for key, reason in index.rejected:
            print(f"{index.tar}:{key}: {reason}")
    for name in undecodable:
        print(f"{name}: cannot be decoded")
    report = _report(indexes) | {"undecodable": undecodable}
    return report, int(bool(undecodable or report["rejected"]))


def _stats(arguments: argparse.Namespace) -> tuple[dict, int]:
    from groupvit_fast.data.reader import SampleReader
    from groupvit_fast.data.text import clean, token_row

    reader = SampleReader(_expand(arguments), arguments.cache_dir, arguments.quiet)
    captions: Counter[str] = Counter()
    for chunk in tqdm(_chunks(len(reader)), "captions", delay=2, disable=_no_bar(arguments)):
        captions.update(map(clean, reader.captions(chunk)))
    tokens = np.repeat([len(token_row(text)) for text in captions], list(captions.values()))
    result = {
        "samples": len(reader),
        "image_bytes": _spread(reader.image_size),
        "image_width": _spread(reader.width),
        "image_height": _spread(reader.height),
        "caption_tokens": _spread(tokens),
        "different_captions": len(captions),
    }
    for name, value in result.items():
        print(f"{name.replace('_', ' '):20}", value if isinstance(value, int) else _spread_line(value))
    return result, 0


def _read(arguments: argparse.Namespace) -> list:
    from groupvit_fast.data.index import read_indexes

    return read_indexes(_expand(arguments), arguments.cache_dir, arguments.quiet)


def _expand(arguments: argparse.Namespace) -> list[Path]:
    from groupvit_fast.data.index import expand_shards

    return expand_shards(arguments.shards)


def _report(indexes: list) -> dict[str, Any]:
    """Print the totals and the reasons; return them with the counts of each shard."""
    reasons = Counter(reason for index in indexes for _, reason in index.rejected)
    samples, rejected = sum(map(len, indexes)), sum(reasons.values())
    print(f"{samples} usable samples in {len(indexes)} shards, {rejected} left out")
    for reason, count in reasons.most_common():
        print(f"{count:8} {reason}")
    shards = [
        {"tar": str(index.tar), "samples": len(index), "rejected": [list(pair) for pair in index.rejected]}
        for index in indexes
    ]
    return {"samples": samples, "rejected": rejected, "reasons": dict(reasons), "shards": shards}


def _undecodable(indexes: list, arguments: argparse.Namespace) -> list[str]:
    import torch

    from groupvit_fast.data.decode import undecodable
    from groupvit_fast.data.reader import SampleReader

    reader = SampleReader([index.tar for index in indexes], arguments.cache_dir, arguments.quiet)
    names = []
    for chunk in tqdm(_chunks(len(reader)), "decode", disable=_no_bar(arguments)):
        encoded, _ = reader.read(chunk)
        names += [reader.name(int(chunk[number])) for number in undecodable(encoded, torch.device("cpu"))]
    return names


def _chunks(count: int, size: int = 1024) -> list[np.ndarray]:
    return [np.arange(start, min(start + size, count)) for start in range(0, count, size)]


def _spread(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    low, middle, high = np.percentile(values, [0, 50, 100]).tolist()
    return {"min": low, "median": middle, "max": high, "mean": float(np.mean(values))}


def _spread_line(spread: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.6g}" for name, value in spread.items())


def _no_bar(arguments: argparse.Namespace) -> bool | None:
    return True if arguments.quiet else None  # None: only on a terminal


if __name__ == "__main__":
    sys.exit(run_command(main))
