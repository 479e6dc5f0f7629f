"""Zero-shot classification: the class whose name is nearest to the image's embedding (ImageNet's top-1).

As the GroupViT paper evaluates it: the shorter side resized to 256 pixels, the central 224, seven templates
of which the raw embeddings are averaged.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from groupvit_fast.console import UserError
from groupvit_fast.data.classification import ClassFolders, LabelledImage, LabelledShards, evaluation_batches
from groupvit_fast.segmentation.evaluation import ALONE, Ranks, ShowProgress, evaluating
from groupvit_fast.segmentation.prompts import TEMPLATE_SETS, encode_classes
from groupvit_fast.segmentation.segment import best_name_of_class

TEMPLATES = TEMPLATE_SETS["subset"]
RESIZE_FACTOR = 256 / 224


@dataclass(frozen=True)
class Classification:
    """Images of each class, and how many of them had it as the best or among the five best."""

    names: tuple[str, ...]
    images: tuple[int, ...]
    top1: tuple[int, ...]
    top5: tuple[int, ...]
    templates: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    """Everything else that was chosen: sizes, precision, device."""

    def share(self, right: Sequence[int]) -> float:
        """Of all images."""
        return sum(right) / max(sum(self.images), 1)

    def to_json(self) -> dict[str, Any]:
        rows = zip(self.names, self.images, self.top1, self.top5, strict=True)
        keys = "name", "images", "top1", "top5"
        return {
            "dataset": "imagenet",
            "images": sum(self.images),
            "top1": self.share(self.top1),
            "top5": self.share(self.top5),
            "templates": list(self.templates),
            "settings": self.settings,
            "per_class": [dict(zip(keys, row, strict=True)) for row in rows],
        }


def open_images(root: Path, classes: list[str] | None) -> tuple[Iterable[LabelledImage], list[str]]:
    """Images and class entries from a folder of class folders, or from shards named by a pattern.

    classes: entry k names label k; without them the names of the folders are the names of the classes.
    """
    if root.is_dir():
        folders = ClassFolders(root)
        names = classes or [name.replace("_", " ") for name in folders.classes]
        if len(names) != len(folders.classes):
            raise UserError(
                f"{root} has {len(folders.classes)} class folders, the class file {len(names)} names"
            )
        return folders, names
    if classes is None:
        raise UserError(f"{root}: shards hold class numbers only; give their names with --class-file")
    import braceexpand

    shards = [
        path for part in braceexpand.braceexpand(str(root)) for path in sorted(glob.glob(part)) or [part]
    ]
    missing = next((shard for shard in shards if not Path(shard).is_file()), None)
    if missing is not None:
        raise UserError(
            f"{missing}: no such folder or shard; give class folders or a pattern such as val-*.tar"
        )
    return LabelledShards(shards), classes


@torch.no_grad()
def classify(
    model: torch.nn.Module,
    images: Iterable[LabelledImage],
    names: Sequence[str],
    *,
    templates: Sequence[str] = TEMPLATES,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    limit: int | None = None,
    precision: str = "fp32",
    progress: ShowProgress | None = None,
    ranks: Ranks = ALONE,
) -> Classification | None:
    """Classify `images` among `names` ("sofa|couch": synonyms) by the nearest embedding.

    precision: "bf16" runs the encoder in bfloat16.

    Errors: UserError for a class number without a name, and for an image that cannot be decoded, because an
    accuracy over fewer images would be another number. The first of several processes returns the result.
    """
    images = islice(islice(images, limit), ranks.rank, None, ranks.size)
    crop = model.config.image.image_size
    resize = round(crop * RESIZE_FACTOR)
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")
    counts = torch.zeros(3, len(names), dtype=torch.int64)
    with evaluating(model.to(device), precision):
        text = encode_classes(model, names, templates)
        options = {"batch_size": batch_size, "device": device}
        batches = evaluation_batches(images, crop=crop, resize=resize, **options)
        for pixels, labels in batches:
            if int(labels.max()) >= len(names):
                raise UserError(f"class number {int(labels.max())} has no name; there are {len(names)} names")
            with autocast:
                embeddings = model.encode_image(pixels).float()
            scores = best_name_of_class(F.normalize(embeddings) @ text.embeddings.T, text)
            best = scores.topk(min(5, len(names)), dim=1).indices.cpu()
            right = best == labels[:, None]
            for row, chosen in enumerate((torch.ones_like(labels).bool(), right[:, 0], right.any(dim=1))):
                counts[row] += torch.bincount(labels[chosen], minlength=len(names))
            if progress is not None:
                done = int(counts[0].sum())
                progress(done, None, int(counts[1].sum()) / done)
    everyone = ranks.gather(counts)
    if not everyone:
        return None
    total = sum(everyone)
    if not total.any():
        raise UserError("no image to classify; check --root")
    settings = {"resize": resize, "crop": crop, "precision": precision, "limit": limit}
    settings |= {"device": str(device), "processes": ranks.size, "torch": torch.__version__}
    return Classification(tuple(names), *map(tuple, total.tolist()), tuple(templates), settings)


def table(result: Classification) -> str:
    """Two lines for people."""
    count = sum(result.images)
    lines = f"top-1  {result.share(result.top1):.3f}", f"top-5  {result.share(result.top5):.3f}"
    return "\n".join([f"imagenet: {count} images, {len(result.names)} classes", "", *lines])
