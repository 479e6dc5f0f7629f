"""Command line for webdataset shards: pack images and captions, index, check, count.

python -m groupvit_fast.shards pack photos/ shards/
python -m groupvit_fast.shards index 'shards/{000000..000012}.tar' --verify full --nouns official
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

from groupvit_fast.console import UserError, printable, run_command, write_bytes_atomically, write_json

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

    _pack_flags(
        command("pack", _pack, "write tar shards; a run that was stopped continues when started again")
    )
    index = command("index", _index, "find the usable samples of each shard and store them for training")
    index.add_argument("--dali", action="store_true", help="also write TAR.idx for DALI's webdataset reader")
    index.add_argument(
        "--nouns",
        metavar="TAGS",
        help="also find the nouns of each caption, as training with --noun-tags TAGS needs them: official, "
        "nouns or phrases, with nltk: in front for NLTK's tagger",
    )
    index.add_argument(
        "--exclude", metavar="FILE", type=Path, help="leave out what FILE lists, a line TAR:KEY for a sample"
    )
    check = command("check", _check, "list every sample that training would leave out, and why")
    _verify_flags(index, check)
    stats = command("stats", _stats, "count samples, sizes of images, lengths and repeats of captions")
    for added in (index, check, stats):
        added.add_argument("shards", metavar="SHARDS", nargs="+", help=_SHARDS_HELP)
        added.add_argument("--cache-dir", metavar="DIR", type=Path, help="where the indexes are kept")
        added.add_argument(
            "--allow-missing", action="store_true", help="go on without shards that are absent"
        )
    return parser


def _verify_flags(*commands: argparse.ArgumentParser) -> None:
    for added in commands:
        added.add_argument(
            "--verify",
            choices=("header", "full"),
            default="header",
            help="header: look at both ends of each image; full: decode it",
        )
        added.add_argument(
            "--quarantine", metavar="FILE", type=Path, help="write what is left out to FILE, a line for each"
        )


def _pack_flags(pack: argparse.ArgumentParser) -> None:
    pack.add_argument(
        "source",
        metavar="SRC",
        type=Path,
        help="a folder of images with .txt captions beside them; a .csv, .tsv, .jsonl or .parquet table; "
        "COCO's captions .json; with --class-template, a folder with a folder of images for each class",
    )
    pack.add_argument("output", metavar="OUT", type=Path, help="folder for 000000.tar, 000001.tar, ...")
    pack.add_argument(
        "--per-shard", metavar="N", type=int, default=10_000, help="most samples a shard (10000)"
    )
    pack.add_argument(
        "--shard-mb", metavar="MB", type=float, default=1000, help="most image data a shard (1000)"
    )
    pack.add_argument(
        "--image-column", metavar="NAME", help="column of paths or images (default: the usual names)"
    )
    pack.add_argument(
        "--caption-column", metavar="NAME", help="column of captions (default: the usual names)"
    )
    pack.add_argument(
        "--base64", action="store_true", help="the image column holds images in base64, not paths"
    )
    pack.add_argument(
        "--class-template", metavar="TEXT", help="caption of class folders, such as 'a photo of a {}.'"
    )
    pack.add_argument(
        "--class-names", metavar="FILE", type=Path, help="lines 'n01440764 tench': names of class folders"
    )
    pack.add_argument("--images", metavar="DIR", type=Path, help="COCO's images (default: beside the .json)")
    pack.add_argument(
        "--every-caption", action="store_true", help="COCO: a sample for each caption of an image"
    )


def _pack(arguments: argparse.Namespace) -> tuple[dict, int]:
    from groupvit_fast.data.index import read_indexes
    from groupvit_fast.data.pack import pack

    skipped: Counter[str] = Counter()

    def skip(name: str, reason: str) -> None:
        skipped[reason] += 1
        if skipped[reason] <= 3:
            print(f"left out: {printable(name)}: {reason}", file=sys.stderr)

    with tqdm(desc="pack", unit="image", disable=_no_bar(arguments)) as bar:
        shards = pack(
            _items(arguments, skip),
            arguments.output,
            str(arguments.source.absolute()),
            skip,
            samples_per_shard=arguments.per_shard,
            bytes_per_shard=int(arguments.shard_mb * 1e6),
            progress=bar.update,
        )
    if not shards:
        raise UserError(f"{arguments.source}: no image with a caption was found")
    usable = sum(map(len, read_indexes(shards, quiet=arguments.quiet)))
    print(f"{usable} usable samples in {len(shards)} shards: {shards[0]} ... {shards[-1]}")
    return {"shards": [str(shard) for shard in shards], "samples": usable, "left_out": dict(skipped)}, 0


def _items(arguments: argparse.Namespace, skip: Any) -> Any:
    """The samples of SRC, by what it is."""
    from groupvit_fast.data import pack_sources, pack_tables

    source = arguments.source
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; name images or a table to pack")
    if arguments.class_template:
        names = pack_sources.read_class_names(arguments.class_names) if arguments.class_names else {}
        return pack_sources.class_items(source, arguments.class_template, names, skip)
    if source.is_dir():
        return pack_sources.folder_items(source, skip)
    if source.suffix == ".json":
        return pack_sources.coco_items(source, arguments.images, arguments.every_caption, skip)
    if source.suffix not in pack_tables.TABLES:
        known = ", ".join(pack_tables.TABLES)
        raise UserError(f"{source}: unknown kind of table; use one of {known}, COCO's .json or a folder")
    columns = {"image": arguments.image_column, "caption": arguments.caption_column}
    return pack_tables.table_items(source, skip, **columns, in_base64=arguments.base64)


def _index(arguments: argparse.Namespace) -> tuple[dict, int]:
    from groupvit_fast.data.index import write_dali_index

    exclude = _exclusions(arguments.exclude) if arguments.exclude else None
    indexes, result = _prepare(arguments, nouns=arguments.nouns, exclude=exclude)
    if arguments.dali:
        for index in indexes:
            write_dali_index(index, index.tar.with_suffix(".idx"))
    _print_totals(result)
    return result, 0


def _check(arguments: argparse.Namespace) -> tuple[dict, int]:
    indexes, result = _prepare(arguments)
    for index in indexes:
        for key, reason in index.rejected:
            print(printable(f"{index.tar}:{key}: {reason}"))
    _print_totals(result)
    return result, int(bool(result["rejected"]))


def _stats(arguments: argparse.Namespace) -> tuple[dict, int]:
    from groupvit_fast.data.indexing import shard_captions
    from groupvit_fast.data.statistics import spread, statistics
    from groupvit_fast.data.text import clean, token_row

    indexes = _read(arguments)
    captions: Counter[str] = Counter()
    for index in tqdm(indexes, "captions", unit="shard", delay=2, disable=_no_bar(arguments)):
        captions.update(map(clean, shard_captions(index)))
    tokens = np.repeat([len(token_row(text)) for text in captions], list(captions.values()))
    result = {"samples": sum(map(len, indexes)), **statistics(indexes), "caption_tokens": spread(tokens)}
    result["different_captions"] = len(captions)
    _print_values(result)
    for caption, count in captions.most_common(5):
        if count > 1:
            print(f"{count:8} x {printable(caption[:80])}")
    return result, 0


def _read(arguments: argparse.Namespace) -> list:
    from groupvit_fast.data.index import read_indexes

    return read_indexes(_expand(arguments), arguments.cache_dir, arguments.quiet)


def _prepare(arguments: argparse.Namespace, **wanted: Any) -> tuple[list, dict]:
    """The indexes, made as the flags say, and the report on them."""
    from groupvit_fast.data.indexing import prepare_indexes
    from groupvit_fast.data.statistics import report

    indexes = prepare_indexes(
        _expand(arguments), arguments.cache_dir, arguments.quiet, verify=arguments.verify, **wanted
    )
    if arguments.quarantine:
        lines = [f"{index.tar}:{key}\t{reason}\n" for index in indexes for key, reason in index.rejected]
        data = "".join(lines).encode("utf-8", "surrogateescape")
        write_bytes_atomically(arguments.quarantine, data)
    return indexes, report(indexes)


def _exclusions(path: Path) -> dict[str, set[str]]:
    from groupvit_fast.data.indexing import read_exclusions

    return read_exclusions(path)


def _expand(arguments: argparse.Namespace) -> list[Path]:
    from groupvit_fast.data.index import expand_shards

    return expand_shards(arguments.shards, allow_missing=arguments.allow_missing)


def _print_totals(result: dict) -> None:
    """The totals, the shards that lost most, the reasons, the statistics."""
    print(
        f"{result['samples']} usable samples in {len(result['shards'])} shards, {result['rejected']} left out"
    )
    for reason, count in result["reasons"].items():
        print(f"{count:8} {reason}")
    losers = sorted(result["shards"], key=lambda shard: -len(shard["rejected"]))
    for shard in losers[:5]:
        if shard["rejected"]:
            print(
                f"{len(shard['rejected']):8} left out of {printable(shard['tar'])}, {shard['samples']} usable"
            )
    _print_values(result["statistics"])


def _print_values(values: dict[str, Any]) -> None:
    for name, value in values.items():
        print(f"{name.replace('_', ' '):20}", value if isinstance(value, int) else _spread_line(value))


def _spread_line(spread: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.6g}" for name, value in spread.items())


def _no_bar(arguments: argparse.Namespace) -> bool | None:
    return True if arguments.quiet else None  # None: only on a terminal


if __name__ == "__main__":
    sys.exit(run_command(main))
