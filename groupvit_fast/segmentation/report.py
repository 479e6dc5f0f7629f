"""The result of an evaluation: numbers for programs (`to_json`) and a table for people (`table`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import torch

from groupvit_fast.console import UserError
from groupvit_fast.segmentation import metrics
from groupvit_fast.segmentation.datasets import SegmentationDataset
from groupvit_fast.segmentation.partial import Progress
from groupvit_fast.segmentation.prompts import synonyms
from groupvit_fast.segmentation.protocols import Protocol
from groupvit_fast.segmentation.tally import JACCARD_ONE, Tally

BAR_WIDTH = 20
_LATER = ("split", "precision", "class_names")
"""What not every result tells; it is compared where both do."""


@dataclass(frozen=True)
class ClassResult:
    """One class: IoU and accuracy (NaN where undefined), and its share of the true and predicted pixels."""

    name: str
    iou: float
    accuracy: float
    share: float
    predicted_share: float


@dataclass(frozen=True)
class Evaluation:
    """What one model scored on one dataset under one protocol."""

    dataset: str
    images: int
    miou: float
    pixel_accuracy: float
    mean_accuracy: float
    per_class: tuple[ClassResult, ...]
    oracle_miou: float
    """mIoU if each group were given its best class: what grouping alone allows."""
    largest_class: str
    miou_largest_class: float
    """mIoU of answering `largest_class`, the most frequent true class, everywhere."""
    groups_in_use: float
    """Groups that own at least one pixel, mean over windows."""
    groups: int
    best_mask_jaccard: float
    """Mean over the classes of each image of the Jaccard index of the group that fits one best."""
    pure_groups: int
    """Groups of which at least 80 % of the labelled pixels are of one class (and that are not specks)."""
    naming_accuracy: float
    """Share of the pure groups that were given the right name."""
    seconds: float
    images_per_s: float
    confusion: tuple[tuple[int, ...], ...]
    """Pixels by true class (rows) and predicted class (columns); empty with more than 1024 classes."""
    left_out: tuple[dict[str, str], ...]
    """Images that could not be used: key and reason."""
    protocol: dict[str, Any]
    settings: dict[str, Any]
    """Everything else that was chosen: device, batch size, limit, versions."""
    miou_interval: tuple[float, float] = (math.nan, math.nan)
    """95 % confidence interval of mIoU over the choice of images (bootstrap)."""
    boundary_miou: float = math.nan
    """mIoU of the pixels near contours; only with details."""
    oracle_miou_by_stage: tuple[float, ...] = ()
    """`oracle_miou` for the groups of each stage, the last one's last; only with details."""
    class_names: tuple[str, ...] = ()
    """The class entries with all their synonyms, label k in place k."""

    def to_json(self) -> dict[str, Any]:
        """JSON-able; an undefined number (NaN) is None."""
        return _without_nan(asdict(self))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Evaluation:
        """The inverse of `to_json`; keys that are not ours are passed over, a missing one is an error."""
        unset = {item.name: KeyError if item.default is MISSING else item.default for item in fields(cls)}
        values = {name: values.get(name, default) for name, default in unset.items()}
        missing = [name for name, value in values.items() if value is KeyError]
        if missing:
            raise UserError(f"not an evaluation result: {missing[0]} is missing; write one with --json")
        known = {item.name for item in fields(ClassResult)}
        try:
            results = [
                ClassResult(**{key: _nan(item) for key, item in row.items() if key in known})
                for row in values["per_class"]
            ]
            numbers = {name: _nan(value) for name, value in values.items()}
            names = ("confusion", "left_out", "miou_interval", "oracle_miou_by_stage", "class_names")
            lists = {name: tuple(map(_nan, values[name])) for name in names}
            result = cls(**{**numbers, **lists, "per_class": tuple(results)})
            result.table(result)  # a number that is none is found here
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise UserError(f"not an evaluation result ({error}); write one with --json") from None
        return result

    def table(self, before: Evaluation | None = None) -> str:
        """A text table for a terminal; with `before`, its mIoU and IoUs stand beside this one's."""
        scored = f"{self.images} images" + (f", {len(self.left_out)} left out" if self.left_out else "")
        title = (
            f"{self.dataset}: {scored}, protocol {self.protocol['name']}, {self.images_per_s:.0f} images/s"
        )
        lines = [title, *(self._differences(before) if before else ()), ""]
        return "\n".join([*lines, *self._class_lines(before), "", *self._summary_lines(before)])

    def _differences(self, before: Evaluation) -> list[str]:
        """What was measured differently: two numbers are comparable only if nothing was."""
        old, new = before._measured(), self._measured()
        differ = [key for key in dict.fromkeys((*new, *old)) if old.get(key) != new.get(key)]
        differ = [key for key in differ if key not in _LATER or (key in old and key in new)]
        lines = [f"{key} was {_short(old.get(key))}, is {_short(new.get(key))}" for key in differ]
        if not lines:  # the same images, and other labels
            shares = {result.name: result.share for result in before.per_class}
            lines = [
                f"share of {name} in the labels was {shares[name]:.4%}, is {share:.4%}"
                for name, share in ((result.name, result.share) for result in self.per_class)
                if shares.get(name, share) != share
            ]
        return [f"not the same measurement: {line}" for line in lines]

    def _measured(self) -> dict[str, Any]:
        """What the numbers depend on beside the model, by name."""
        settings = {key: self.settings[key] for key in ("split", "precision") if key in self.settings}
        names = {"class_names": list(self.class_names)} if self.class_names else {}
        protocol = {key: value for key, value in self.protocol.items() if key not in ("source", "name")}
        return {"dataset": self.dataset, "images": self.images, **settings, **names, **protocol}

    def _class_lines(self, before: Evaluation | None) -> list[str]:
        width = max(len("class"), *(len(result.name) for result in self.per_class))
        old = {result.name: result.iou for result in before.per_class} if before else {}
        header = f"{'class':<{width}}  {'before  ' if before else ''}{'after' if before else 'IoU':>6}"
        lines = [f"{header}  {'':<{BAR_WIDTH}}  {'pixels':>8}  {'predicted':>9}"]
        for result in self.per_class:
            previous = f"{_number(old.get(result.name, math.nan)):>6}  " if before else ""
            lines.append(
                f"{result.name:<{width}}  {previous}{_number(result.iou):>6}  {bar(result.iou):<{BAR_WIDTH}}"
                f"  {result.share:>8.1%}  {result.predicted_share:>9.1%}"
            )
        return lines

    def _summary_lines(self, before: Evaluation | None) -> list[str]:
        low, high = self.miou_interval
        between = "" if math.isnan(low) else f"95 % interval over images: {low:.3f} to {high:.3f}"
        rows = [("mIoU", _number(self.miou), between)]
        if before is not None:
            rows.append(("  before", _number(before.miou), ""))
        rows += [
            ("  largest class", _number(self.miou_largest_class), f'"{self.largest_class}" everywhere'),
            ("  oracle", _number(self.oracle_miou), "each group given its best class"),
        ]
        for number, value in enumerate(self.oracle_miou_by_stage[:-1], 1):
            rows.append((f"  oracle, stage {number}", _number(value), "the groups of that stage"))
        if not math.isnan(self.boundary_miou):
            rows.append(("  near contours", _number(self.boundary_miou), "boundary IoU, 2 % of the diagonal"))
        rows += [
            ("pixel accuracy", _number(self.pixel_accuracy), ""),
            ("mean accuracy", _number(self.mean_accuracy), ""),
            ("best mask", _number(self.best_mask_jaccard), "Jaccard index of the group that fits best"),
            ("named right", _number(self.naming_accuracy), f"of {self.pure_groups} pure groups"),
            ("groups in use", f"{self.groups_in_use:.1f}", f"of {self.groups}"),
        ]
        return [f"{label:<18}{value:>6}  {note}".rstrip() for label, value, note in rows]


def summarise(
    dataset: SegmentationDataset,
    protocol: Protocol,
    progress: Progress,
    groups: Sequence[int],
    settings: dict[str, Any],
) -> Evaluation:
    """Turn counts into the scores of the report; `groups` are those of each grouping stage."""
    tally, sums = progress.tally, progress.tally.scalars
    oracles = [metrics.iou(counts).nanmean().item() for counts in tally.oracle]
    results = class_results(dataset, tally.counts)
    seconds = max(progress.seconds / settings["processes"], 1e-9)
    return Evaluation(
        dataset=dataset.name,
        images=sums["images"],
        miou=metrics.iou(tally.counts).nanmean().item(),
        miou_interval=_interval(tally),
        pixel_accuracy=metrics.pixel_accuracy(tally.counts),
        mean_accuracy=metrics.accuracy(tally.counts).nanmean().item(),
        per_class=results,
        oracle_miou=oracles[-1],
        oracle_miou_by_stage=tuple(oracles) if tally.details else (),
        boundary_miou=metrics.iou(tally.boundary).nanmean().item(),
        largest_class=results[int(tally.counts[1].argmax())].name,
        miou_largest_class=metrics.iou(metrics.largest_class_counts(tally.counts)).nanmean().item(),
        groups_in_use=sums["used_groups"] / sums["windows"],
        groups=groups[-1],
        best_mask_jaccard=sums["jaccard"] / JACCARD_ONE / sums["masks"] if sums["masks"] else math.nan,
        pure_groups=sums["pure_groups"],
        naming_accuracy=sums["named_groups"] / sums["pure_groups"] if sums["pure_groups"] else math.nan,
        seconds=seconds,
        images_per_s=sums["images"] / seconds,
        confusion=tuple(map(tuple, tally.confusion.tolist())),
        left_out=tuple(progress.left_out[number] for number in sorted(progress.left_out)),
        protocol=protocol.to_dict(),
        settings=settings,
        class_names=tuple(dataset.class_names),
    )


def class_results(dataset: SegmentationDataset, counts: torch.Tensor) -> tuple[ClassResult, ...]:
    """One row a class from the counts [3, K]."""
    total = max(int(counts[1].sum()), 1)
    columns = (
        metrics.iou(counts).tolist(),
        metrics.accuracy(counts).tolist(),
        (counts[1] / total).tolist(),
        (counts[2] / total).tolist(),
    )
    rows = zip(dataset.class_names, *columns, strict=True)
    return tuple(ClassResult(synonyms(name)[0], *row) for name, *row in rows)


def _interval(tally: Tally) -> tuple[float, float]:
    if not tally.by_image:
        return math.nan, math.nan
    ordered = [tally.by_image[number] for number in sorted(tally.by_image)]
    return metrics.bootstrap_interval(torch.stack(ordered))


def bar(value: float) -> str:
    """A horizontal bar for a number from 0 to 1, in eighths of a character."""
    if math.isnan(value):
        return ""
    eighths = round(max(0.0, min(1.0, value)) * BAR_WIDTH * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _nan(value: Any) -> Any:
    return math.nan if value is None else value


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value
