"""Where the samples of new shards come from: a folder, a table, class folders, COCO captions.

Each source yields `Item`s in an order that depends on the source alone, and reads no image yet.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from groupvit_fast.console import UserError
from groupvit_fast.data.scan import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS

Skip = Callable[[str, str], None]  # is told (name, reason) of each entry that gives no item


class Item(NamedTuple):
    """One sample to be packed."""

    image: Path | bytes  # a file, or the encoded image itself
    extension: str  # "jpg", "png", "webp"
    caption: str
    size: int  # of the image, bytes
    identity: str  # changes when the image does


def folder_items(folder: Path, skip: Skip) -> Iterator[Item]:
    """Every image under `folder`, sorted by path, that has its caption in a text file of the same name."""
    for path in image_files(folder):
        captions = [path.with_suffix(f".{kind}") for kind in CAPTION_EXTENSIONS]
        caption = next((place for place in captions if place.is_file()), None)
        if caption is None:
            skip(str(path), "no .txt beside it")
        else:
            yield from file_item(path, caption.read_text("utf-8", "replace"), skip)


def class_items(folder: Path, template: str, names: dict[str, str], skip: Skip) -> Iterator[Item]:
    """Images in one folder per class (ImageNet's layout); `template` makes a caption of the class name.

    `names` gives a class name for the name of its folder; a folder that is not in it names its class itself.
    """
    if template.count("{}") != 1:
        raise UserError(f"template '{template}' must contain {{}} exactly once, as in 'a photo of a {{}}.'")
    for path in image_files(folder):
        inside = path.relative_to(folder).parts
        if len(inside) < 2:
            skip(str(path), "in no class folder")
            continue
        name = names.get(inside[0], inside[0].replace("_", " "))
        yield from file_item(path, template.replace("{}", name), skip)


def read_class_names(path: Path) -> dict[str, str]:
    """Lines "n01440764 tench, Tinca tinca": folder, space or tab, names; the first of them counts."""
    names = {}
    for line in path.read_text("utf-8").splitlines():
        folder, _, listed = line.strip().replace("\t", " ", 1).partition(" ")
        if listed:
            names[folder] = listed.split(",")[0].strip()
    if not names:
        raise UserError(f"{path}: holds no line such as 'n01440764 tench, Tinca tinca'")
    return names


def coco_items(path: Path, images: Path | None, every_caption: bool, skip: Skip) -> Iterator[Item]:
    """Images of a COCO captions JSON, by image id, with the first caption or once with every caption.

    Image files lie in `images`, or in the folder of the JSON.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        files = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
        captions: dict[int, list[tuple[int, str]]] = defaultdict(list)
        for note in content["annotations"]:
            captions[int(note["image_id"])].append((int(note["id"]), str(note["caption"])))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not COCO captions with images and annotations ({error!r})") from None
    for number in sorted(files):
        found = [caption for _, caption in sorted(captions[number])]
        if not found:
            skip(files[number], "no caption")
        for caption in found if every_caption else found[:1]:
            yield from file_item((images or path.parent) / files[number], caption.strip(), skip)


def image_files(folder: Path) -> list[Path]:
    """All images under a folder by their extension, sorted by path; hidden ones are passed over."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a folder of images")
    found = [path for path in folder.rglob("*") if path.suffix[1:].lower() in IMAGE_EXTENSIONS]
    return sorted(path for path in found if not path.name.startswith("."))


def file_item(path: Path, caption: str, skip: Skip) -> Iterator[Item]:
    """The item of an image file, if there is one."""
    try:
        status = path.stat()
        extension = path.suffix[1:].lower()
        if extension not in IMAGE_EXTENSIONS:
            with open(path, "rb") as file:
                extension = _extension_of(file.read(16))
    except OSError as error:
        skip(str(path), os.strerror(error.errno) if error.errno else str(error))
        return
    if not extension or not path.is_file():
        skip(str(path), "not a JPEG, PNG or WebP file")
        return
    identity = f"{os.fsencode(path).hex()} {status.st_size} {status.st_mtime_ns}"
    yield Item(path, extension, caption, status.st_size, identity)


def bytes_item(data: bytes, name: str, caption: str, skip: Skip) -> Iterator[Item]:
    """The item of an encoded image."""
    extension = _extension_of(data[:16])
    if extension:
        yield Item(data, extension, caption, len(data), hashlib.sha256(data).hexdigest())
    else:
        skip(name, "not a JPEG, PNG or WebP image")


def _extension_of(head: bytes) -> str:
    """The file extension for the first 16 bytes of an image, empty when it is none."""
    if head.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if head.startswith(b"RIFF") and head[8:12] == b"WEBP" else ""
