"""Evaluation protocols by name, each with the source of its numbers."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace

from groupvit_fast.console import UserError
from groupvit_fast.segmentation.knobs import MODES, Protocol
from groupvit_fast.segmentation.prompts import TEMPLATE_SETS

__all__ = ["MODES", "PROTOCOLS", "Protocol", "protocol"]


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


def sclip() -> Protocol:
    """SCLIP's way from scores to labels, for groups instead of patches."""
    return Protocol(
        name="sclip",
        source="SCLIP release, configs; without its lists of words: give those of background with "
        "--background-names, classes and their synonyms with --class-file",
        short_side=336,
        crop=224,
        stride=112,
        templates=TEMPLATE_SETS["clip"],
        normalise_each_template=True,
        class_scores="late",
        top_k=None,
        logit_scale=40.0,
        background_rule="probability",
        background_thresholds={"voc21": 0.1, "context60": 0.1, "coco_object": 0.1},
        datasets={
            "voc21": {"logit_scale": 65.0, "area_threshold": 0.1},
            "context60": {"logit_scale": 50.0},
            "coco_object": {"logit_scale": 50.0},
            "coco_stuff": {"short_side": 448},
            "cityscapes": {"short_side": 560},
        },
    )


def clearclip() -> Protocol:
    """ClearCLIP's numbers, in SCLIP's steps."""
    return replace(
        sclip(),
        name="clearclip",
        source="ClearCLIP release, configs; names of background and synonyms as under sclip",
        short_side=448,
        crop=448,
        stride=224,
        logit_scale=50.0,
        background_thresholds={"voc21": 0.5, "context60": 0.15, "coco_object": 0.4},
        datasets={"cityscapes": {"crop": 224, "stride": 224}},
    )


def proxyclip() -> Protocol:
    """ProxyCLIP's numbers, in SCLIP's steps."""
    return replace(
        sclip(),
        name="proxyclip",
        source="ProxyCLIP release, configs; names of background and synonyms as under sclip",
        crop=336,
        stride=112,
        background_thresholds={"voc21": 0.2, "context60": 0.15, "coco_object": 0.25},
        datasets={
            "ade20k": {"short_side": 448},
            "cityscapes": {"short_side": 448, "crop": 224, "stride": 112},
        },
    )


def zeroseg() -> Protocol:
    """ZeroSeg's thresholds in the released GroupViT evaluation."""
    return replace(
        official(),
        name="zeroseg",
        source="ZeroSeg paper (as summarised elsewhere): thresholds; windows not stated, so GroupViT's",
        background_thresholds={"voc21": 0.95, "context60": 0.05, "coco_object": 0.35},
    )


PROTOCOLS: dict[str, Callable[[], Protocol]] = {
    make.__name__: make
    for make in (official, shapes, paper, tcl, ovsegmentor, segclip, sclip, clearclip, proxyclip, zeroseg)
}


def protocol(name: str) -> Protocol:
    """The protocol called `name`; an unknown name is an error that tells the nearest one."""
    if name not in PROTOCOLS:
        nearest = difflib.get_close_matches(name, PROTOCOLS, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise UserError(f"unknown protocol {name!r}: {hint}choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]()
