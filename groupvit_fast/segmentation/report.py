"""The result of an evaluation: numbers for programs (`to_json`) and a table for people (`table`)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from groupvit_fast.console import UserError

BAR_WIDTH = 20


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
    pure_groups: int
    """Groups of which at least 80 % of the labelled pixels are of one class (and that are not specks)."""
    naming_accuracy: float
    """Share of the pure groups that were given the right name."""
    seconds: float
    images_per_s: float
    confusion: tuple[tuple[int, ...], ...]
    """Pixels by true class (rows) and predicted class (columns)."""
    left_out: tuple[dict[str, str], ...]
    """Images that could not be used: key and reason."""
    protocol: dict[str, Any]
    settings: dict[str, Any]
    """Everything else that was chosen: device, batch size, limit, versions."""

    def to_json(self) -> dict[str, Any]:
        """JSON-able; an undefined number (NaN) is None."""
        return _without_nan(asdict(self))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Evaluation:
        """The inverse of `to_json`; keys that are not ours are passed over, a missing one is an error."""
        values = {item.name: values.get(item.name, KeyError) for item in fields(cls)}
        missing = [name for name, value in values.items() if value is KeyError]
        if missing:
            raise UserError(f"not an evaluation result: {missing[0]} is missing; write one with --json")
        results = [
            ClassResult(**{key: _nan(item) for key, item in row.items()}) for row in values["per_class"]
        ]
        numbers = {name: _nan(value) for name, value in values.items()}
        lists = {name: tuple(values[name]) for name in ("confusion", "left_out")}
        return cls(**{**numbers, **lists, "per_class": tuple(results)})

    def table(self, before: Evaluation | None = None) -> str:
        """A text table for a terminal; with `before`, its mIoU and IoUs stand beside this one's."""
        scored = f"{self.images} images" + (f", {len(self.left_out)} left out" if self.left_out else "")
        title = (
            f"{self.dataset}: {scored}, protocol {self.protocol['name']}, {self.images_per_s:.0f} images/s"
        )
        return "\n".join([title, "", *self._class_lines(before), "", *self._summary_lines(before)])

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
        rows = [("mIoU", _number(self.miou), "")]
        if before is not None:
            rows.append(("  before", _number(before.miou), ""))
        rows += [
            ("  largest class", _number(self.miou_largest_class), f'"{self.largest_class}" everywhere'),
            ("  oracle", _number(self.oracle_miou), "each group given its best class"),
            ("pixel accuracy", _number(self.pixel_accuracy), ""),
            ("named right", _number(self.naming_accuracy), f"of {self.pure_groups} pure groups"),
            ("groups in use", f"{self.groups_in_use:.1f}", f"of {self.groups}"),
        ]
        return [f"{label:<18}{value:>6}  {note}".rstrip() for label, value, note in rows]


def bar(value: float) -> str:
    """A horizontal bar for a number from 0 to 1, in eighths of a character."""
    if math.isnan(value):
        return ""
    eighths = round(max(0.0, min(1.0, value)) * BAR_WIDTH * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


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
