"""Protocols: published numbers, refusals, and an explanation that holds every knob."""

import json
import math
from dataclasses import fields, replace

import pytest

from groupvit_fast.console import UserError
from groupvit_fast.segmentation import Protocol, protocol
from groupvit_fast.segmentation.protocols import PROTOCOLS


def test_official_numbers():
    official = protocol("official")
    assert (official.short_side, official.long_side, official.crop, official.stride) == (448, 2048, 448, 224)
    assert official.templates == ("a photo of a {}.",)
    assert official.top_k == 5
    assert official.background_thresholds == {"voc21": 0.95, "context60": 0.35, "coco_object": 0.95}


@pytest.mark.parametrize(
    ("name", "templates", "side", "rule", "voc", "context"),
    [
        ("paper", 80, 448, "capped", 0.9, 0.5),
        ("tcl", 9, 448, "constant", 0.5, 0.5),
        ("ovsegmentor", 1, 448, "capped", 0.95, 0.35),
        ("segclip", 1, 224, "capped", 0.8, 0.25),
        ("sclip", 80, 336, "probability", 0.1, 0.1),
        ("clearclip", 80, 448, "probability", 0.5, 0.15),
        ("proxyclip", 80, 336, "probability", 0.2, 0.15),
        ("zeroseg", 1, 448, "capped", 0.95, 0.05),
    ],
)
def test_numbers_of_other_protocols(name, templates, side, rule, voc, context):
    chosen = protocol(name)
    assert (len(chosen.templates), chosen.short_side, chosen.background_rule) == (templates, side, rule)
    assert (chosen.background_thresholds["voc21"], chosen.background_thresholds["context60"]) == (
        voc,
        context,
    )


def test_resolve_takes_the_threshold_of_the_dataset():
    resolved = protocol("official").resolve(dataset="context60", background=True, image_size=224)
    assert resolved.background_threshold == 0.35
    override = protocol("official").resolve(
        dataset="context60", background=True, image_size=224, threshold=0.5
    )
    assert override.background_threshold == 0.5
    without = protocol("official").resolve(dataset="voc20", background=False, image_size=224)
    assert without.background_threshold is None


def test_resolve_takes_the_image_size_of_the_model():
    own_size = replace(protocol("shapes"), short_side=None)
    assert own_size.resolve(dataset="voc-folder", background=False, image_size=64).short_side == 64
    assert protocol("shapes").resolve(dataset="voc-folder", background=False, image_size=64).short_side == 96
    assert protocol("official").resolve(dataset="voc20", background=False, image_size=64).short_side == 448


def test_some_datasets_have_knobs_of_their_own():
    def resolved(name, dataset, background=False):
        return protocol(name).resolve(dataset=dataset, background=background, image_size=224)

    assert resolved("sclip", "voc21", True).logit_scale == 65
    assert resolved("sclip", "context60", True).logit_scale == 50
    assert resolved("sclip", "voc20").logit_scale == 40
    assert resolved("sclip", "cityscapes").short_side == 560
    assert resolved("sclip", "voc21", True).area_threshold == 0.1
    assert resolved("sclip", "context60", True).area_threshold is None
    assert resolved("clearclip", "voc21", True).area_threshold is None
    assert "on voc21: logit scale 65, area threshold 0.1" in protocol("sclip").explain()
    assert "at most 0.1 of the pixels" in resolved("sclip", "voc21", True).explain()
    city = resolved("proxyclip", "cityscapes")
    assert (city.short_side, city.crop, city.stride, city.logit_scale) == (448, 224, 112, 40)
    assert "on cityscapes: short side 448, crop 224, stride 112" in protocol("proxyclip").explain()
    chosen = protocol("sclip").with_knobs({"logit_scale": 30.0})
    assert chosen.resolve(dataset="voc21", background=True, image_size=224).logit_scale == 30
    assert chosen.resolve(dataset="cityscapes", background=False, image_size=224).short_side == 560


def test_background_with_names_is_a_class():
    chosen = replace(protocol("sclip"), background_names=("sky", "wall"))
    assert chosen.entries(["dog", "sofa|couch"]) == ["dog", "sofa|couch"]
    resolved = chosen.resolve(dataset="voc21", background=True, image_size=224)
    assert resolved.entries(["dog", "sofa|couch"]) == ["sky|wall", "dog", "sofa|couch"]
    assert not resolved.has_background_channel
    with pytest.raises(UserError, match="background_names is 'sky'"):
        resolved.entries(["boat", "Sky"])
    official = protocol("official").resolve(dataset="voc21", background=True, image_size=224)
    assert official.entries(["dog"]) == ["dog"]
    assert official.has_background_channel


def test_a_threshold_without_background_is_refused():
    with pytest.raises(UserError, match="has no background class"):
        protocol("official").resolve(dataset="voc20", background=False, image_size=224, threshold=0.5)


def test_an_area_threshold_without_background_is_refused():
    chosen = protocol("sclip").with_knobs({"area_threshold": 0.1})
    with pytest.raises(UserError, match="leave --area-threshold out"):
        chosen.resolve(dataset="voc20", background=False, image_size=224)


def test_a_background_without_a_threshold_is_refused():
    with pytest.raises(UserError, match="give one with --background-threshold"):
        protocol("official").resolve(dataset="voc-folder", background=True, image_size=224)


def test_unknown_protocol_names_the_nearest():
    with pytest.raises(UserError, match="did you mean official"):
        protocol("offical")


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "windows"},
        {"class_scores": "cosine"},
        {"background_rule": "none"},
        {"background_rule": "probability"},
        {"background_names": ()},
        {"datasets": {"voc21": {"templates": 3}}},
        {"short_side": 0},
        {"top_k": -1},
        {"crop": 0},
        {"stride": 0},
        {"stride": 449},
        {"templates": ()},
        {"templates": ("a photo",)},
        {"logit_scale": 0.0},
        {"logit_scale": math.nan},
        {"logit_scale": math.inf},
        {"background_threshold": 1.5},
        {"area_threshold": 0.1},
        {"area_threshold": 1.0, "class_scores": "late", "background_rule": "probability"},
        {"background_threshold": math.nan},
    ],
)
def test_impossible_knobs(change):
    with pytest.raises(UserError, match=next(iter(change)).removesuffix("s")) as error:
        replace(protocol("official"), **change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_knob_is_in_the_json(name):
    values = protocol(name).to_dict()
    assert set(values) == {field.name for field in fields(Protocol)}
    assert json.loads(json.dumps(values)) == values
    assert values["name"] == name
    assert values["source"]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_explanation_names_the_numbers(name):
    chosen = protocol(name)
    text = chosen.explain()
    assert name in text
    assert chosen.source in text
    assert chosen.templates[0] in text
    if chosen.mode == "slide":
        assert f"{chosen.crop} px every {chosen.stride} px" in text
    resolved = chosen.resolve(dataset="x", background=True, image_size=64, threshold=0.123)
    assert "0.123" in resolved.explain()


@pytest.mark.parametrize(
    "change",
    [
        {"source": "elsewhere"},
        {"short_side": 300},
        {"long_side": 999},
        {"mode": "whole"},
        {"crop": 300},
        {"stride": 100},
        {"templates": ("a {}", "b {}", "c {}")},
        {"normalise_each_template": True},
        {"class_scores": "softmax"},
        {"top_k": 3},
        {"logit_scale": 30.0},
        {"background_rule": "constant"},
        {"background_threshold": 0.4},
        {"background_thresholds": {"voc21": 0.4}},
        {"datasets": {"voc21": {"crop": 100}}},
    ],
)
def test_the_explanation_tells_every_knob(change):
    official = protocol("official")
    assert replace(official, **change).explain() != official.explain()


@pytest.mark.parametrize("threshold", [None, 0.1])
@pytest.mark.parametrize(
    "change",
    [
        {"area_threshold": 0.2},
        {"background_names": ("sky", "wall", "tree", "road", "sea", "sand")},
        {"logit_scale": 41.0},
    ],
)
def test_the_explanation_tells_every_knob_of_late_scores(change, threshold):
    sclip = replace(protocol("sclip"), background_threshold=threshold)
    text = replace(sclip, **change).explain()
    assert text != sclip.explain()
    if "background_names" in change:
        assert "sky, wall, tree, road, sea and 1 more" in text
