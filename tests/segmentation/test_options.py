"""Protocol flags and the early check of output paths."""

import argparse
import os
from dataclasses import replace

import pytest

from groupvit_fast.console import UserError
from groupvit_fast.model import preset
from groupvit_fast.segmentation import protocol
from groupvit_fast.segmentation.options import add_protocol_flags, protocol_from_flags, require_writable


def flags(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_protocol_flags(parser)
    return parser.parse_args(words)


def test_auto_goes_by_the_size_of_the_model():
    assert protocol_from_flags(flags(), preset("tiny")) == protocol("shapes")
    assert protocol_from_flags(flags(), preset("groupvit-gcc-yfcc")) == protocol("official")
    assert protocol_from_flags(flags()) == protocol("official")
    assert protocol_from_flags(flags("--protocol", "official"), preset("tiny")) == protocol("official")


def test_every_flag_changes_its_knob():
    words = "--templates noun simple --top-k 3 --short-side 90 --mode whole --crop 64 --stride 32"
    chosen = protocol_from_flags(flags(*words.split(), "--logit-scale", "40"))
    assert chosen.name == "official (changed)"
    assert chosen.templates == ("{}", "a photo of a {}.")
    assert (chosen.top_k, chosen.short_side, chosen.mode) == (3, 90, "whole")
    assert (chosen.crop, chosen.stride, chosen.logit_scale) == (64, 32, 40.0)
    assert protocol_from_flags(flags("--top-k", "0")).top_k is None
    assert protocol_from_flags(flags("--templates", "a {} here")).templates == ("a {} here",)


def test_the_area_threshold_of_a_protocol_can_be_changed_and_left_out():
    def on_voc21(*words):
        chosen = protocol_from_flags(flags("--protocol", "sclip", *words))
        return chosen.resolve(dataset="voc21", background=True, image_size=224).area_threshold

    assert (on_voc21(), on_voc21("--area-threshold", "0.2"), on_voc21("--area-threshold", "0")) == (
        0.1, 0.2, None,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"area_threshold is 0\.1, wanted none"):
        protocol_from_flags(flags("--area-threshold", "0.1"))


def test_background_names_come_from_a_file(tmp_path):
    (tmp_path / "stuff.txt").write_text("sky\nwall\n")
    chosen = protocol_from_flags(
        flags("--protocol", "sclip", "--background-names", str(tmp_path / "stuff.txt"))
    )
    assert chosen.background_names == ("sky", "wall")
    assert "with the names sky, wall" in replace(chosen, background_threshold=0.1).explain()


def test_a_template_without_a_place_for_the_name():
    with pytest.raises(UserError, match=r"with \{\} for the class name"):
        protocol_from_flags(flags("--templates", "nouns"))


def test_require_writable(tmp_path):
    require_writable(None)
    require_writable(tmp_path / "a" / "b" / "c.json")
    require_writable(tmp_path, folder=True)
    file = tmp_path / "file"
    file.touch()
    require_writable(file)
    with pytest.raises(UserError, match="is a folder"):
        require_writable(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        require_writable(file, folder=True)
    with pytest.raises(UserError, match="is not a folder"):
        require_writable(file / "below.json")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="no permission to write"):
        require_writable(tmp_path / "x.json")
