"""The counts of an evaluation: integers that add up over images, batches, processes and interrupted runs.

Whatever the order and the grouping of the images, the sums are the same, bit for bit.

Shapes: K classes, S grouping stages, n images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from groupvit_fast.segmentation import boundary, metrics
from groupvit_fast.segmentation.decode import Segmentation

MATRIX_CLASSES = 1024
"""With more classes than this the confusion matrix is not kept, only its diagonal and sums."""
IMAGE_COUNTS = 1 << 26
"""Counts by image, for confidence intervals, are kept up to this many numbers."""
PIXELS_PER_COUNT = {"cpu": 1 << 18, "cuda": 1 << 22}
"""Counted at once: on a CPU what its caches hold, 2 MB a map. More where more sums than that are made."""
JACCARD_ONE = 1 << 32
SCALARS = ("images", "windows", "used_groups", "pure_groups", "named_groups", "masks", "jaccard")


class Tally:
    """Counts of some images of a dataset, on one device.

    counts [3, K] and confusion [K, K] (empty with more than 1024 classes): pixels, as in `metrics`;
    oracle [S, 3, K]: the same if each group of a stage had its best class, the final stage last;
    boundary [3, K]: the same for pixels near borders; only with details (else [3, 0]), as are earlier stages.
    scalars: sums by the names in SCALARS; `jaccard` in units of 2^-32.
    image_numbers [n], image_counts [n, 3, K]: `counts` by image.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        stages: int = 1,
        details: bool = False,
        images: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_classes = num_classes
        matrix = num_classes if num_classes <= MATRIX_CLASSES else 0
        integers = {"dtype": torch.int64, "device": device}
        self.counts = torch.zeros(3, num_classes, **integers)
        self.confusion = torch.zeros(matrix, matrix, **integers)
        self.oracle = torch.zeros(stages, 3, num_classes, **integers)
        self.boundary = torch.zeros(3, num_classes if details else 0, **integers)
        self.scalars = dict.fromkeys(SCALARS, 0)
        self.by_image: dict[int, Tensor] | None = {} if images * 3 * num_classes <= IMAGE_COUNTS else None

    @property
    def details(self) -> bool:
        return self.boundary.shape[1] > 0

    def add(
        self,
        numbers: Sequence[int],
        segmentations: Sequence[Segmentation],
        targets: Sequence[Tensor],
        groups: int,
    ) -> None:
        """Count the images `numbers`; their groups are numbered through, so one pass counts all of them."""
        device = self.counts.device
        targets = [target.to(device) for target in targets]
        flat = torch.cat([target.flatten() for target in targets])
        labels = torch.cat([item.labels.flatten() for item in segmentations])
        self._add_images(numbers, flat, labels, [target.numel() for target in targets])
        if self.details:
            for item, target in zip(segmentations, targets, strict=True):
                self.boundary += boundary.boundary_counts(target, item.labels, self.num_classes)
        if len(self.confusion):
            for pair in _pieces(flat, labels, sums=self.confusion.numel()):
                self.confusion += metrics.confusion_matrix(*pair, self.num_classes)
        for stage in range(len(self.oracle) - 1):
            owner, offsets = _numbered([item.stages[stage] for item in segmentations])
            truth = sum(
                metrics.joint_histogram(*pair, self.num_classes, offsets[-1]).T
                for pair in _pieces(flat, owner, sums=self.num_classes * offsets[-1])
            )
            self.oracle[stage] += metrics.oracle_counts(truth)
        self._add_groups(segmentations, flat, labels, groups)

    def _add_images(self, numbers: Sequence[int], target: Tensor, labels: Tensor, sizes: list[int]) -> None:
        sizes = torch.tensor(sizes, device=target.device)
        image = torch.arange(len(numbers), device=target.device).repeat_interleave(sizes)
        counts = sum(
            metrics.counts_by_image(*pieces, len(numbers), self.num_classes)
            for pieces in _pieces(target, labels, image, sums=len(numbers) * self.num_classes)
        )
        self.counts += counts.sum(dim=0)
        if self.by_image is not None:
            self.by_image |= dict(zip(numbers, counts.int().cpu(), strict=True))

    def _add_groups(
        self, segmentations: Sequence[Segmentation], target: Tensor, labels: Tensor, groups: int
    ) -> None:
        owner, offsets = _numbered([(item.groups, item.num_groups) for item in segmentations])
        parts = [
            metrics.group_histograms(*pieces, offsets[-1], self.num_classes)
            for pieces in _pieces(target, labels, owner, sums=offsets[-1] * self.num_classes)
        ]
        truth, named = (sum(part) for part in zip(*parts, strict=True))
        self.oracle[-1] += metrics.oracle_counts(truth)
        counts = torch.tensor([item.num_groups for item in segmentations])
        image_of_group = torch.arange(len(counts)).repeat_interleave(counts).to(owner.device)
        pure, right = metrics.named_groups(truth, named, image_of_group)
        masks, jaccard = metrics.best_masks(truth, image_of_group)
        used = int(torch.bincount(owner, minlength=offsets[-1]).count_nonzero())
        fixed = int((jaccard * JACCARD_ONE).round().long().sum())
        sums = len(segmentations), offsets[-1] // groups, used, pure, right, masks, fixed
        for name, value in zip(SCALARS, sums, strict=True):
            self.scalars[name] += value

    def merge(self, other: Tally) -> None:
        """Add the counts of other images."""
        for name in ("counts", "confusion", "oracle", "boundary"):
            getattr(self, name).add_(getattr(other, name).to(self.counts.device))
        for name, value in other.scalars.items():
            self.scalars[name] += value
        if self.by_image is not None and other.by_image is not None:
            self.by_image |= other.by_image

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything, on the CPU, to be saved or sent; `from_tensors` is the inverse."""
        tensors = {name: getattr(self, name).cpu() for name in ("counts", "confusion", "oracle", "boundary")}
        tensors["scalars"] = torch.tensor([self.scalars[name] for name in SCALARS])
        if self.by_image is not None:
            tensors["image_numbers"] = torch.tensor(list(self.by_image), dtype=torch.int64)
            counts = list(self.by_image.values())
            tensors["image_counts"] = (
                torch.stack(counts) if counts else torch.zeros(0, 3, self.num_classes, dtype=torch.int32)
            )
        return tensors

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], device: torch.device | str = "cpu") -> Tally:
        shape = {"stages": len(tensors["oracle"]), "details": tensors["boundary"].numel() > 0}
        tally = cls(tensors["counts"].shape[1], **shape, device=device)
        for name in ("counts", "confusion", "oracle", "boundary"):
            getattr(tally, name).copy_(tensors[name])
        tally.scalars = dict(zip(SCALARS, tensors["scalars"].tolist(), strict=True))
        tally.by_image = None
        if "image_numbers" in tensors:
            tally.by_image = dict(
                zip(tensors["image_numbers"].tolist(), tensors["image_counts"], strict=True)
            )
        return tally


def _numbered(maps: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, list[int]]:
    """(group map, number of groups) of each image -> all pixels with groups numbered through, and offsets."""
    offsets = torch.tensor([0, *(count for _, count in maps)]).cumsum(0).tolist()
    numbered = [(groups + offset).flatten() for (groups, _), offset in zip(maps, offsets, strict=False)]
    return torch.cat(numbered), offsets


def _pieces(*maps: Tensor, sums: int) -> Iterator[tuple[Tensor, ...]]:
    """Cut the pixels of some maps alike; `sums` is how many counts each piece makes."""
    pixels = max(PIXELS_PER_COUNT["cuda" if maps[0].is_cuda else "cpu"], sums)
    return zip(*(part.split(pixels) for part in maps), strict=True)
