"""Presets and the configuration dataclasses."""

import json

import pytest

from groupvit_fast.model.groupvit import create_model
from groupvit_fast.model.presets import PRESETS, ImageConfig, ModelConfig, TextConfig, preset


@pytest.mark.parametrize("name", PRESETS)
def test_survives_json(name):
    config = preset(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name", ["groupvit-gcc-yfcc", "groupvit-gcc-redcaps"])
def test_published_models_have_55_7_million_parameters(name):
    count = sum(parameter.numel() for parameter in create_model(name).parameters())
    assert round(count / 1e6, 1) == 55.7


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'groupvit-gcc-yfcc'"):
        preset("groupvit-gcc-yfc")


@pytest.mark.parametrize("part", ["image", "text", None])
def test_unknown_key_is_named(part):
    values = preset("tiny").to_dict()
    (values[part] if part else values)["widht"] = 3
    with pytest.raises(ValueError, match="unknown key 'widht' in model"):
        ModelConfig.from_dict(values)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"depths": (6, 3)}, "depths one more"),
        ({"output_groups": (64,)}, "one entry per grouping stage"),
        ({"group_tokens": (64, 0)}, "at least 1"),
        ({"width": 100}, "multiple of its 6 heads"),
        ({"image_size": 220}, "multiple of patch_size"),
        ({"tau": 0.0}, "tau must be positive"),
        ({"drop_path": 1.0}, "drop_path"),
    ],
)
def test_impossible_image_config_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ImageConfig(**wrong)


def test_impossible_text_and_model_config_are_refused():
    with pytest.raises(ValueError, match="multiple of its 4 heads"):
        TextConfig(width=30)
    with pytest.raises(ValueError, match="projector_layers"):
        ModelConfig(projector_layers=3)
