"""What an evaluation protocol consists of: every knob that changes a published number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from groupvit_fast.console import UserError
from groupvit_fast.segmentation.explain import explain
from groupvit_fast.segmentation.prompts import BACKGROUND, TEMPLATE_SETS, synonyms

MODES = ("whole", "slide")
CLASS_SCORES = ("gated", "softmax", "late")
BACKGROUND_RULES = ("capped", "constant", "probability")
KNOBS_OF_A_DATASET = ("short_side", "crop", "stride", "logit_scale", "area_threshold")


@dataclass(frozen=True)
class Protocol:
    """How an image becomes labels. `resolve` fills in what depends on the model and the dataset."""

    name: str
    source: str
    """Where the numbers below were taken from."""
    short_side: int | None = 448
    """Images are resized so that the short side has this many pixels; None: the model's training size."""
    long_side: int | None = 2048
    """Upper limit of the long side after resizing; None: no limit."""
    mode: str = "slide"
    """`slide`: windows of `crop` pixels every `stride` pixels; `whole`: the resized image is one window."""
    crop: int = 448
    stride: int = 224
    templates: tuple[str, ...] = TEMPLATE_SETS["simple"]
    normalise_each_template: bool = False
    """Normalise every sentence before averaging over templates, instead of averaging raw projections."""
    class_scores: str = "gated"
    """`gated`: softmax over all names x softmax over the window's `top_k` classes; `softmax`: only the first;
    `late`: windows are averaged and resized as scale x cosine, and the softmax over all names comes last."""
    top_k: int | None = 5
    """Classes that a window keeps, by its mean feature; None: all."""
    logit_scale: float | None = None
    """Factor on cosines before the softmax; None: the learnt one, at most 100."""
    background_rule: str = "capped"
    """`capped`: a pixel below min(threshold, best score in the window) is background there; `constant`:
    background is a class whose score is the threshold everywhere; `probability` (with late scores only):
    background has names of its own, and also takes every pixel whose best probability is below the
    threshold."""
    background_names: tuple[str, ...] = (BACKGROUND,)
    """Names of the background class under the rule `probability`."""
    background_thresholds: Mapping[str, float] = field(default_factory=dict)
    """Threshold of each dataset that has a background class, by dataset name."""
    background_threshold: float | None = None
    """The threshold in use; None: no background class. Set by `resolve`."""
    area_threshold: float | None = None
    """Under the rule `probability`: a class that wins at most this share of the pixels that all classes but
    background win gets none of an image's pixels; they go to the best of the other classes, or to background.
    None: every class keeps its pixels."""
    datasets: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Other values of some knobs for single datasets: sizes, `logit_scale` or `area_threshold`."""

    def __post_init__(self) -> None:
        _require(self.mode in MODES, "mode", self.mode, f"one of {', '.join(MODES)}")
        _require(
            self.class_scores in CLASS_SCORES, "class_scores", self.class_scores, " or ".join(CLASS_SCORES)
        )
        _require(self.background_rule in BACKGROUND_RULES, "background_rule", self.background_rule,
                 " or ".join(BACKGROUND_RULES))  # fmt: skip
        late = self.class_scores == "late"
        _require(late or self.background_rule != "probability", "background_rule", self.background_rule,
                 "capped or constant: only late scores have the probability of a pixel")  # fmt: skip
        _require(not late or self.background_rule == "probability", "background_rule", self.background_rule,
                 "probability with late scores")  # fmt: skip
        _require(len(self.background_names) > 0, "background_names", "empty", "at least one name")
        unknown = {knob for knobs in self.datasets.values() for knob in knobs} - set(KNOBS_OF_A_DATASET)
        _require(not unknown, "datasets", sorted(unknown), f"some of {', '.join(KNOBS_OF_A_DATASET)}")
        for knob in ("short_side", "long_side", "top_k"):
            value = getattr(self, knob)
            _require(value is None or value >= 1, knob, value, "1 or more")
        _require(self.crop >= 1, "crop", self.crop, "1 or more")
        _require(1 <= self.stride <= self.crop, "stride", self.stride, f"1 to crop ({self.crop})")
        _require(len(self.templates) > 0, "templates", self.templates, "at least one template")
        for template in self.templates:
            _require("{}" in template, "template", repr(template), "a text with {} for the class name")
        scale = self.logit_scale
        _require(scale is None or 0 < scale < float("inf"), "logit_scale", scale, "a positive number")
        threshold = self.background_threshold
        _require(threshold is None or 0 <= threshold <= 1, "background_threshold", threshold, "0 to 1")
        areas = [self.area_threshold, *(knobs.get("area_threshold") for knobs in self.datasets.values())]
        for area in areas:
            _require(area is None or 0 <= area < 1, "area_threshold", area, "0 or more and less than 1")
            _require(area is None or self.background_rule == "probability", "area_threshold", area,
                     "none: only the rule probability has one")  # fmt: skip

    @property
    def has_background_channel(self) -> bool:
        """Whether background is a score channel before those of the classes, without names of its own."""
        return self.background_threshold is not None and self.background_rule != "probability"

    def entries(self, foreground: Sequence[str]) -> list[str]:
        """The class entries to embed: `foreground`, and background before it where a text stands for it."""
        if self.background_threshold is None or self.has_background_channel:
            return list(foreground)
        taken = {name.lower() for entry in foreground for name in synonyms(entry)}
        clash = [name for name in self.background_names if name.lower() in taken]
        _require(not clash, "background_names", repr("".join(clash[:1])), "no name of another class")
        return ["|".join(self.background_names), *foreground]

    def resolve(
        self, *, dataset: str, background: bool, image_size: int, threshold: float | None = None
    ) -> Protocol:
        """Fill in the model's image size and what the dataset decides: other sizes, the background threshold.

        threshold: overrides the protocol's own. Refused for a dataset without background, because it would
            turn correct pixels into errors without a word.
        """
        if threshold is not None and not background:
            raise UserError(
                f"dataset {dataset} has no background class, so a background threshold ({threshold:g}) would "
                "only produce errors; leave --background-threshold out"
            )
        if self.area_threshold is not None and not background:
            raise UserError(
                f"dataset {dataset} has no background class that small classes could become; "
                "leave --area-threshold out"
            )
        if background and threshold is None:
            threshold = self.background_thresholds.get(dataset)
            if threshold is None:
                raise UserError(
                    f"protocol {self.name} has no background threshold for dataset {dataset}; "
                    "give one with --background-threshold"
                )
        changes = {"short_side": self.short_side or image_size, "background_threshold": threshold}
        return replace(self, **(changes | dict(self.datasets.get(dataset, {}))))

    def with_knobs(self, changes: Mapping[str, Any]) -> Protocol:
        """Other values for some knobs, which then hold for every dataset."""
        others = {
            name: {knob: value for knob, value in knobs.items() if knob not in changes}
            for name, knobs in self.datasets.items()
        }
        changes = {"datasets": {name: knobs for name, knobs in others.items() if knobs}, **changes}
        return replace(self, **changes, name=f"{self.name} (changed)")

    def to_dict(self) -> dict[str, Any]:
        """Every knob, JSON-able."""
        lists = {name: list(getattr(self, name)) for name in ("templates", "background_names")}
        return {**asdict(self), **lists}

    def explain(self) -> str:
        """The steps in words, with this protocol's numbers."""
        return explain(self)


def _require(condition: bool, knob: str, value: object, wanted: str) -> None:
    if not condition:
        raise UserError(f"protocol: {knob} is {value}, wanted {wanted}")
