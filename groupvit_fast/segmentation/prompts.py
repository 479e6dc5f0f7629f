"""From class names to text embeddings: class lists, synonyms, templates and how they are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from groupvit_fast.console import UserError
from groupvit_fast.data.prompts import PROMPT_TEMPLATES
from groupvit_fast.data.text import tokenize

BACKGROUND = "background"
MOST_CLASSES = 65_535  # with background, what a 16-bit mask holds

TEMPLATE_SETS: dict[str, tuple[str, ...]] = {
    "noun": ("{}",),
    "simple": ("a photo of a {}.",),
    "subset": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
    "clip": PROMPT_TEMPLATES,
}
"""Named sets of sentences; `subset` is the choice of seven that CLIP's authors found to be enough."""


class ClassText(NamedTuple):
    """The text side of K classes, each with one or more names (synonyms); N names in all.

    embeddings: [N, D], L2-normalised, one row a name.
    owner: [N] int64, the class of each name; ascending, and every class 0..K-1 occurs.
    """

    embeddings: Tensor
    owner: Tensor

    @property
    def num_classes(self) -> int:
        return int(self.owner[-1]) + 1

    def to(self, device: torch.device | str) -> ClassText:
        return ClassText(self.embeddings.to(device), self.owner.to(device))


def parse_classes(text: str) -> list[str]:
    """Split `"dog, grass, sofa|couch"` into class entries; `|` separates the synonyms of one class."""
    entries = [" ".join(entry.split()) for entry in text.split(",")]
    if not any(entries):
        raise UserError('the class list is empty; give names such as --classes "dog, grass, sofa|couch"')
    if "" in entries:
        raise UserError(f"the class list {text!r} has an empty name; write each name between two commas")
    return check_classes(entries, "the class list")


def read_class_file(path: Path) -> list[str]:
    """Read one class entry a line; lines that start with `#` and blank lines at the end do not count."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: no such class list; write one class name a line") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a UTF-8 text file; write one class name a line") from None
    entries = [" ".join(line.split()) for line in lines if not line.startswith("#")]
    while entries and not entries[-1]:
        entries.pop()
    if not entries:
        raise UserError(f"{path}: the class list is empty; write one class name a line")
    if "" in entries:
        raise UserError(f"{path}: blank line before class {entries.index('')}; the line number is the label")
    return check_classes(entries, str(path))


def check_classes(entries: Sequence[str], where: str) -> list[str]:
    """Return `entries` if every name is there and no name is used twice (whatever its case)."""
    seen: dict[str, str] = {}
    for entry in entries:
        for name in synonyms(entry):
            if not name:
                raise UserError(f"{where}: {entry!r} has an empty synonym; write it like 'sofa|couch'")
            if any("\ud800" <= letter <= "\udfff" for letter in name):
                raise UserError(f"{where}: {name!r} has bytes that are no text; write names in UTF-8")
            if name.lower() in seen:
                raise UserError(f"{where}: {name!r} occurs twice (in {seen[name.lower()]!r} and {entry!r})")
            seen[name.lower()] = entry
    return list(entries)


def foreground_classes(entries: Sequence[str], most: int = MOST_CLASSES) -> list[str]:
    """`entries` without a leading "background", which is a rule and not a name to look for."""
    entries = list(entries[1:] if entries[0].lower() == BACKGROUND else entries)
    if not entries:
        raise UserError("the class list has nothing but background; name at least one class")
    if any(BACKGROUND in map(str.lower, synonyms(entry)) for entry in entries):
        raise UserError(f"{BACKGROUND!r} is a rule, not a name to look for; leave it out of the class list")
    if len(entries) > most:
        raise UserError(f"the class list has {len(entries)} classes; give at most {most}")
    return entries


def synonyms(entry: str) -> list[str]:
    """The names of a class entry, `"sofa|couch"` -> `["sofa", "couch"]`; the first is shown to people."""
    return [name.strip() for name in entry.split("|")]


@torch.no_grad()
def class_embeddings(
    model: torch.nn.Module,
    names: Sequence[str],
    templates: Sequence[str] = TEMPLATE_SETS["simple"],
    *,
    normalise_each: bool = False,
    batch_size: int = 256,
) -> Tensor:
    """Embed each name as the normalised mean of its filled-in templates.

    normalise_each: normalise every sentence before the mean (as SCLIP and MaskCLIP do), so that each
        template has the same weight; otherwise the raw projections are averaged (as GroupViT does).

    Returns: [len(names), D] float32 on the model's device, rows of length 1.
    """
    device, length = next(model.parameters()).device, model.config.text.context_length
    together = max(1, batch_size // len(templates))
    means = []
    for start in range(0, len(names), together):
        part = names[start : start + together]
        tokens = tokenize([template.replace("{}", name) for name in part for template in templates], length)
        embeddings = model.encode_text(tokens.to(device)).float().unflatten(0, (len(part), len(templates)))
        if normalise_each:
            embeddings = F.normalize(embeddings, dim=-1)
        means.append(F.normalize(embeddings.mean(dim=1), dim=-1))
    return torch.cat(means)


def encode_classes(
    model: torch.nn.Module, entries: Sequence[str], templates: Sequence[str], *, normalise_each: bool = False
) -> ClassText:
    """Embed class entries with their synonyms; background is a rule, not a text: leave it out."""
    names = [(name, index) for index, entry in enumerate(entries) for name in synonyms(entry)]
    embeddings = class_embeddings(
        model, [name for name, _ in names], templates, normalise_each=normalise_each
    )
    return ClassText(embeddings, torch.tensor([index for _, index in names], device=embeddings.device))
