"""One or several held-out datasets: the first counts, the others stand beside it by name."""

from __future__ import annotations

import pytest
from PIL import Image

from groupvit_fast.console import UserError
from groupvit_fast.segmentation import protocol
from groupvit_fast.segmentation.held_out import HeldOut


@pytest.fixture
def places(tools, tmp_path):
    tools.make_voc(tmp_path / "a", seed=1)
    tools.make_voc(tmp_path / "b=c", seed=2, sizes=((32, 32),) * 3)
    return [str(tmp_path / "a"), str(tmp_path / "b=c")]


def open_places(places, **changes):
    options = {"layout": "voc-folder", "protocol": protocol("shapes"), "background_threshold": None}
    return HeldOut.open(places, **{**options, "device": "cpu", **changes})


def test_a_folder_alone_has_the_given_layout(fake_model, places, tmp_path):
    held_out = open_places(places[:1])
    results = held_out.evaluate(fake_model)
    assert results["images"] == 5
    assert "others" not in results
    held_out.picture(fake_model, "title", tmp_path / "p.png", count=2)
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.width > 100


def test_a_folder_with_an_equals_sign_is_a_folder_still(fake_model, places):
    assert open_places(places[1:]).evaluate(fake_model)["images"] == 3


def test_several_datasets(fake_model, places, monkeypatch):
    """The same layout under two names, as two datasets would be."""
    from groupvit_fast.segmentation import held_out as module

    plain = module.open_dataset
    monkeypatch.setattr(module, "open_dataset", lambda name, root: plain("voc-folder", root))
    results = open_places([places[0], f"other={places[1]}"]).evaluate(fake_model)
    assert results["images"] == 5
    assert {name: other["images"] for name, other in results["others"].items()} == {"other": 3}
    assert results["miou"] != results["others"]["other"]["miou"]


def test_two_of_a_name_and_an_unknown_name_are_one_line(places):
    with pytest.raises(UserError, match="there are two of voc-folder"):
        open_places(places)
    with pytest.raises(UserError, match="voc22"):
        open_places([f"voc22={places[0]}"])
