"""Evaluation protocols: every knob that changes a published number, by name and with its source."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from groupvit_fast.console import UserError
from groupvit_fast.segmentation.prompts import TEMPLATE_SETS

MODES = ("whole", "slide")
CLASS_SCORES = ("gated", "softmax")
BACKGROUND_RULES = ("capped", "constant")


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
    """`gated`: softmax over all classes x softmax over the window's `top_k`; `softmax`: only the first."""
    top_k: int | None = 5
    """Classes that a window keeps, by its mean feature; None: all."""
    logit_scale: float | None = None
    """Factor on cosines before the softmax; None: the learnt one, at most 100."""
    background_rule: str = "capped"
    """`capped`: a pixel below min(threshold, best score in the window) is background there; `constant`:
    background is a class whose score is the threshold everywhere."""
    background_thresholds: Mapping[str, float] = field(default_factory=dict)
    """Threshold of each dataset that has a background class, by dataset name."""
    background_threshold: float | None = None
    """The threshold in use; None: no background class. Set by `resolve`."""

    def __post_init__(self) -> None:
        _require(self.mode in MODES, "mode", self.mode, f"one of {', '.join(MODES)}")
        _require(
            self.class_scores in CLASS_SCORES, "class_scores", self.class_scores, " or ".join(CLASS_SCORES)
        )
        _require(self.background_rule in BACKGROUND_RULES, "background_rule", self.background_rule,
                 " or ".join(BACKGROUND_RULES))  # fmt: skip
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

    def resolve(
        self, *, dataset: str, background: bool, image_size: int, threshold: float | None = None
    ) -> Protocol:
        """Fill in the model's image size and the dataset's background threshold.

        threshold: overrides the protocol's own. Refused for a dataset without background, because it would
            turn correct pixels into errors without a word.
        """
        if threshold is not None and not background:
            raise UserError(
                f"dataset {dataset} has no background class, so a background threshold ({threshold:g}) would "
                "only produce errors; leave --background-threshold out"
            )
        if background and threshold is None:
            threshold = self.background_thresholds.get(dataset)
            if threshold is None:
                raise UserError(
                    f"protocol {self.name} has no background threshold for dataset {dataset}; "
                    "give one with --background-threshold"
                )
        return replace(self, short_side=self.short_side or image_size, background_threshold=threshold)

    def to_dict(self) -> dict[str, Any]:
        """Every knob, JSON-able."""
        return {**asdict(self), "templates": list(self.templates)}

    def explain(self) -> str:
        """The steps in words, with this protocol's numbers."""
        steps = [self._explain_resize(), self._explain_windows(), *_EXPLAIN_GROUPS, self._explain_text()]
        steps += [self._explain_scores(), self._explain_background(), *_EXPLAIN_END]
        lines = [f"protocol {self.name} (source: {self.source})"]
        return "\n".join(lines + [f"  {number}. {step}" for number, step in enumerate(steps, 1)])

    def _explain_resize(self) -> str:
        size = "the model's training size" if self.short_side is None else f"{self.short_side} px"
        limit = "" if self.long_side is None else f", long side at most {self.long_side} px"
        how = "bilinear without antialias, in 8 bits as OpenCV does; then ImageNet mean/std"
        return f"resize to short side {size}{limit}; {how}"

    def _explain_windows(self) -> str:
        if self.mode == "whole":
            return "the whole image is one window"
        return (
            f"cut windows of {self.crop} px every {self.stride} px, the last one shifted back inside; "
            f"a shorter side gives a shorter window"
        )

    def _explain_text(self) -> str:
        order = "normalise each, average" if self.normalise_each_template else "average, then normalise"
        shown = ", ".join(repr(template) for template in self.templates[:3])
        more = f" and {len(self.templates) - 3} more" if len(self.templates) > 3 else ""
        return f"embed every class name in {len(self.templates)} template(s) ({shown}{more}): {order}"

    def _explain_scores(self) -> str:
        scale = "the learnt scale (at most 100)" if self.logit_scale is None else f"{self.logit_scale:g}"
        softmax = f"score of a class for a group = softmax over classes of {scale} x cosine"
        if self.class_scores == "softmax":
            return softmax
        kept = (
            "all classes"
            if self.top_k is None
            else f"the {self.top_k} best classes of the window's mean feature"
        )
        return f"{softmax}, times the same softmax over {kept} only"

    def _explain_background(self) -> str:
        if self.background_threshold is None:
            thresholds = ", ".join(f"{key} {value:g}" for key, value in self.background_thresholds.items())
            known = f" (thresholds: {thresholds})" if thresholds else ""
            return f"background: none unless the dataset has one{known}"
        if self.background_rule == "constant":
            return f"background has the score {self.background_threshold:g} everywhere"
        return (
            f"a pixel whose best score is below min({self.background_threshold:g}, the window's best score) "
            "gets background score 1 there, otherwise 0"
        )


_EXPLAIN_GROUPS = (
    "encode each window once; multiply the soft assignment maps of the stages (no noise)",
    "resize the group maps to the window, bilinear; each pixel belongs to its strongest group",
)
_EXPLAIN_END = (
    "a pixel has its group's class scores; average them over the windows that cover it",
    "resize the class scores to the size of the original image, bilinear; each pixel takes the best class",
)


def _require(condition: bool, knob: str, value: object, wanted: str) -> None:
    if not condition:
        raise UserError(f"protocol: {knob} is {value}, wanted {wanted}")


def official() -> Protocol:
    """The released GroupViT evaluation."""
    return Protocol(
        name="official",
        source="GroupViT release, segmentation configs: short side 448, crop 448, stride 224, one template",
        background_thresholds={"voc21": 0.95, "context60": 0.35, "coco_object": 0.95},
    )


def shapes() -> Protocol:
    """The built-in dataset: the scene as drawn is one window, bare class names, no background class."""
    return Protocol(
        name="shapes",
        source="this package, for the built-in shapes dataset",
        short_side=96,
        templates=TEMPLATE_SETS["noun"],
        long_side=None,
        mode="whole",
        top_k=5,
    )


def paper() -> Protocol:
    """The numbers of the paper's text, which differ from the released configuration."""
    return replace(
        official(),
        name="paper",
        source="GroupViT paper, section 4.1: templates and thresholds; windows not stated, so the release's",
        templates=TEMPLATE_SETS["clip"],
        background_thresholds={"voc21": 0.9, "context60": 0.5},
    )


def tcl() -> Protocol:
    """The unified evaluation of TCL: nine templates and one background score for every dataset."""
    return replace(
        official(),
        name="tcl",
        source="TCL release, configs/eval.yml without PAMR refinement; class scores stay GroupViT's",
        templates=(*TEMPLATE_SETS["subset"], "a photo of many {}.", "a photo of {}s."),
        background_rule="constant",
        background_thresholds={"voc21": 0.5, "context60": 0.5, "coco_object": 0.5},
    )


def ovsegmentor() -> Protocol:
    """OVSegmentor's configuration: the release's, with another threshold for COCO."""
    return replace(
        official(),
        name="ovsegmentor",
        source="OVSegmentor release, segmentation configs",
        background_thresholds={"voc21": 0.95, "context60": 0.35, "coco_object": 0.9},
    )


def segclip() -> Protocol:
    """SegCLIP's configuration: small images, windows side by side."""
    return replace(
        official(),
        name="segclip",
        source="SegCLIP release, segmentation configs; class scores stay GroupViT's",
        short_side=224,
        crop=224,
        stride=224,
        background_thresholds={"voc21": 0.80, "context60": 0.25, "coco_object": 0.65},
    )


PROTOCOLS: dict[str, Callable[[], Protocol]] = {
    make.__name__: make for make in (official, shapes, paper, tcl, ovsegmentor, segclip)
}


def protocol(name: str) -> Protocol:
    """The protocol called `name`; an unknown name is an error that tells the nearest one."""
    if name not in PROTOCOLS:
        nearest = difflib.get_close_matches(name, PROTOCOLS, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise UserError(f"unknown protocol {name!r}: {hint}choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]()
