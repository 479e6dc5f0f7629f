"""From rows of scores to labels: the last step of every protocol, for any number of pixels at once.

Shapes: R rows (groups, or combinations of them), C score channels, N names, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from groupvit_fast.segmentation.prompts import ClassText
from groupvit_fast.segmentation.protocols import Protocol


@dataclass(frozen=True)
class BestChannel:
    """The label is the best channel.

    A blend of rows that share a label has it too: a channel that is the largest in each of them is the
    largest in every mean of them. So a row's kind (see `LateSoftmax`) is its label.
    """

    area_threshold: ClassVar[None] = None

    def labels(self, rows: Tensor) -> Tensor:
        """[R, C] -> int64 [R]."""
        return rows.argmax(dim=1)

    def kinds(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """[R, C] -> the kind of each row, and the label of each kind where the two differ."""
        return rows.argmax(dim=1), None

    def select(self, rows: Tensor) -> tuple[BestChannel, Tensor]:
        """Leave out the channels that can win nowhere, and keep the labels of the others."""
        # A channel that is zero everywhere can win only where all are zero, and then the first one does.
        used = rows.any(dim=0)
        used[0] = True
        channels = used.nonzero()[:, 0]
        return BestOf(channels), rows[:, channels]


@dataclass(frozen=True)
class BestOf(BestChannel):
    """`BestChannel` over some of the channels; `channels` [C] are their labels."""

    channels: Tensor

    def labels(self, rows: Tensor) -> Tensor:
        return self.channels[rows.argmax(dim=1)]


@dataclass(frozen=True)
class LateSoftmax:
    """The label is the class of the best name, and 0 where its probability is below `threshold`.

    A row's kind is its best name, or a number of its own where the threshold decides. A blend of rows of one
    kind has the label of that kind: the best name stays the best, and its probability does not fall below
    the threshold, because -log of it, logsumexp(scores) - best score, is convex. Two names of one class are
    two kinds: between them a name of another class may be the best; and a blend of different rows below the
    threshold may well rise above it. All this also holds if only the names in `open`, bool [N], may be best.
    """

    owner: Tensor
    threshold: float | None
    area_threshold: float | None = None
    """See `Protocol`: the classes of `without_small` are known only once all pixels of an image have one."""
    open: Tensor | None = None

    def before_thresholds(self) -> LateSoftmax:
        """The rule that decides which classes are small."""
        return replace(self, threshold=None, area_threshold=None)

    def without_small(self, labels: Tensor) -> LateSoftmax:
        """The rule for an image with these `labels` before thresholds: its small classes win nowhere."""
        areas = torch.bincount(labels.flatten(), minlength=int(self.owner.max()) + 1)
        areas[0] = 0
        kept = areas > self.area_threshold * areas.sum()
        kept[0] = True
        return replace(self, area_threshold=None, open=kept[self.owner])

    def best(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The best score of each row and its name."""
        return (rows if self.open is None else rows.masked_fill(~self.open, -torch.inf)).max(dim=1)

    def labels(self, rows: Tensor) -> Tensor:
        """[R, N] -> int64 [R]."""
        best, name = self.best(rows)
        labels = self.owner[name]
        if self.threshold is not None:
            labels = labels.masked_fill((best - rows.logsumexp(dim=1)).exp() < self.threshold, 0)
        return labels

    def kinds(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        best, name = self.best(rows)
        if self.threshold is None:
            return name, self.owner
        below = (best - rows.logsumexp(dim=1)).exp() < self.threshold
        own = torch.arange(len(self.owner), len(self.owner) + len(rows), device=rows.device)
        return torch.where(below, own, name), torch.cat([self.owner, torch.zeros_like(own)])

    def select(self, rows: Tensor) -> tuple[LateSoftmax, Tensor]:
        return self, rows


def labelling(text: ClassText, protocol: Protocol) -> BestChannel | LateSoftmax:
    """The rule of a resolved protocol."""
    if protocol.class_scores == "late":
        return LateSoftmax(text.owner, protocol.background_threshold, protocol.area_threshold)
    return BestChannel()
