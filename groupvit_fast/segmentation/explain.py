"""A protocol in words: the steps from an image to labels, with its numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from groupvit_fast.segmentation.knobs import Protocol

GROUPS = (
    "encode each window once; multiply the soft assignment maps of the stages (no noise)",
    "resize the group maps to the window, bilinear; each pixel belongs to its strongest group",
)
LABELS = (
    "a pixel has its group's class scores; average them over the windows that cover it",
    "resize the class scores to the size of the original image, bilinear; each pixel takes the best class",
)
LATE_LABELS = (
    "a pixel has its group's scores; average them over the windows that cover it",
    "resize the scores to the size of the original image, bilinear; softmax over all names; a class has the "
    "probability of its best name; each pixel takes the best class",
)


def explain(protocol: Protocol) -> str:
    """The steps, numbered, and what differs on single datasets."""
    steps = [_resize(protocol), _windows(protocol), *GROUPS, _text(protocol), _scores(protocol)]
    if protocol.class_scores == "late":
        steps += [*LATE_LABELS, _background(protocol)]
    else:
        steps += [_background(protocol), *LABELS]
    lines = [f"protocol {protocol.name} (source: {protocol.source})"]
    lines += [f"  {number}. {step}" for number, step in enumerate(steps, 1)]
    for dataset, knobs in protocol.datasets.items():
        values = ", ".join(f"{knob.replace('_', ' ')} {value:g}" for knob, value in knobs.items())
        lines.append(f"  on {dataset}: {values}")
    return "\n".join(lines)


def _resize(protocol: Protocol) -> str:
    size = "the model's training size" if protocol.short_side is None else f"{protocol.short_side} px"
    limit = "" if protocol.long_side is None else f", long side at most {protocol.long_side} px"
    how = "bilinear without antialias, in 8 bits as OpenCV does; then ImageNet mean/std"
    return f"resize to short side {size}{limit}; {how}"


def _windows(protocol: Protocol) -> str:
    if protocol.mode == "whole":
        return "the whole image is one window"
    return (
        f"cut windows of {protocol.crop} px every {protocol.stride} px, the last one shifted back inside; "
        f"a shorter side gives a shorter window"
    )


def _text(protocol: Protocol) -> str:
    order = "normalise each, average" if protocol.normalise_each_template else "average, then normalise"
    shown = ", ".join(repr(template) for template in protocol.templates[:3])
    more = f" and {len(protocol.templates) - 3} more" if len(protocol.templates) > 3 else ""
    return f"embed every class name in {len(protocol.templates)} template(s) ({shown}{more}): {order}"


def _scores(protocol: Protocol) -> str:
    scale = "the learnt scale (at most 100)" if protocol.logit_scale is None else f"{protocol.logit_scale:g}"
    if protocol.class_scores == "late":
        return f"score of a name for a group = {scale} x cosine"
    softmax = (
        f"score of a class for a group = softmax over all names of {scale} x cosine, the best of its names"
    )
    if protocol.class_scores == "softmax":
        return softmax
    kept = "all classes"
    if protocol.top_k is not None:
        kept = f"the {protocol.top_k} best classes of the window's mean feature"
    return f"{softmax}, times the same softmax over {kept} only"


def _background(protocol: Protocol) -> str:
    threshold = protocol.background_threshold
    if threshold is not None:
        return _rule(protocol, f"{threshold:g}")
    thresholds = ", ".join(f"{key} {value:g}" for key, value in protocol.background_thresholds.items())
    known = f" (thresholds: {thresholds})" if thresholds else ""
    return f"background: none unless the dataset has one{known}; then {_rule(protocol, 'the threshold')}"


def _rule(protocol: Protocol, threshold: str) -> str:
    if protocol.background_rule == "constant":
        return f"background has the score {threshold} everywhere"
    if protocol.background_rule == "capped":
        return (
            f"a pixel whose best score is below min({threshold}, the window's best score) "
            "gets background score 1 there, otherwise 0"
        )
    names = protocol.background_names
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    area = ""
    if protocol.area_threshold is not None:
        area = (
            f"; a class that wins at most {protocol.area_threshold:g} of the pixels that all classes but "
            "background win leaves them to the best of the rest"
        )
    return (
        f"background is a class with the names {shown}{area}; it also takes every pixel whose best "
        f"probability is below {threshold}"
    )
