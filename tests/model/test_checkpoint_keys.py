"""The key map between our layout, Hugging Face's and the official one."""

import pytest
import torch

from groupvit_fast.model.checkpoint_keys import foreign_keys, from_ours, to_ours
from groupvit_fast.model.groupvit import create_model
from groupvit_fast.model.presets import preset


@pytest.fixture
def state(small_config):
    return create_model(small_config, seed=0).state_dict()


@pytest.mark.parametrize("name", ["groupvit-gcc-yfcc", "tiny"])
def test_every_parameter_has_a_name_in_every_layout(name):
    with torch.device("meta"):
        keys = create_model(preset(name)).state_dict().keys()
    assert all(foreign_keys(key, "ours") == (key,) for key in keys)
    for layout in ("hf", "official"):
        names = [name for key in keys for name in foreign_keys(key, layout)]
        assert len(set(names)) == len(names)


def test_hugging_face_names_are_those_of_the_library(random_hf_model, small_hf_config, state):
    theirs = random_hf_model(small_hf_config).state_dict()
    ours = from_ours(state, "hf")
    del ours["multi_label_logit_scale"]
    assert {name: value.shape for name, value in ours.items()} == {
        name: value.shape for name, value in theirs.items()
    }


@pytest.mark.parametrize(
    ("ours", "official"),
    [
        ("image_encoder.stages.1.blocks.0.attention.qkv.bias", "img_encoder.layers.1.blocks.0.attn.qkv.bias"),
        ("image_encoder.stages.0.group_tokens", "img_encoder.layers.0.group_token"),
        ("text_encoder.position", "text_encoder.positional_embedding"),
        (
            "text_encoder.blocks.1.attention.qkv.weight",
            "text_encoder.transformer.resblocks.1.attn.in_proj_weight",
        ),
        ("image_projector.norm.running_mean", "img_projector.linear_hidden.1.running_mean"),
        ("multi_label_logit_scale", "multi_label_logit_scale"),
    ],
)
def test_official_names(ours, official):
    assert foreign_keys(ours, "official") == (official,)


def test_official_shapes(state):
    official = from_ours(state, "official")
    assert official["img_projector.linear_hidden.0.weight"].shape == (40, 32, 1)
    assert official["text_projector.linear_out.weight"].shape == (20, 40, 1)
    assert official["img_encoder.layers.0.blocks.0.attn.qkv.weight"].shape == (96, 32)
    stem = "img_encoder.layers.0.downsample.pre_assign_attn.attn."
    assert official[stem + "k_proj.weight"].shape == (32, 32)
    assert stem + "proj.weight" in official


@pytest.mark.parametrize("layout", ["hf", "official"])
def test_round_trip_is_bit_equal(state, layout):
    back, report = to_ours(from_ours(state, layout), layout, state)
    assert report.complete
    assert set(state) == set(back)
    assert all(torch.equal(back[name], state[name]) for name in back)


def test_report_names_what_is_wrong(state):
    official = from_ours(state, "official")
    del official["img_encoder.norm.weight"]
    official["head.weight"] = torch.zeros(3)
    official["text_encoder.ln_final.bias"] = torch.zeros(7)
    found, report = to_ours(official, "official", state)
    assert report.missing == ["img_encoder.norm.weight"]
    assert report.unexpected == ["head.weight"]
    assert report.misshaped == ["text_encoder.ln_final.bias: [7], expected [24]"]
    assert not report.complete
    assert set(state) - set(found) == {"image_encoder.norm.weight", "text_encoder.norm.bias"}


def test_foreign_name_is_refused():
    with pytest.raises(KeyError, match="no parameter of a GroupViT"):
        foreign_keys("image_encoder.stages.x.norm", "hf")
