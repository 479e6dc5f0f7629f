"""The demo without the web: encode once, label often, forget the oldest, refuse what is no class list."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from groupvit_fast.console import UserError
from groupvit_fast.segmentation import protocol, studio
from groupvit_fast.segmentation.evaluation import encode_protocol_classes
from groupvit_fast.segmentation.reference import segment_image
from groupvit_fast.segmentation.studio import Studio, UnknownPhoto, read_class_text, sample_image

from .test_page import unpacked


def png(tools, shape=(48, 80), seed=4) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(tools.blobs(*shape, np.random.default_rng(seed))).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def room(tools) -> Studio:
    chosen = tools.replace(protocol("official"), short_side=32, crop=32, stride=16)
    return Studio(tools.FakeModel(), chosen, name="fake")


@pytest.mark.parametrize("name", ["official", "tcl", "sclip"])
@pytest.mark.parametrize("background", [None, 0.1])
def test_labels_are_those_of_the_reference(tools, name, background):
    chosen = tools.replace(protocol(name), short_side=32, crop=32, stride=16)
    room = Studio(tools.FakeModel(), chosen, name="fake")
    data, entries = png(tools), ["sky", "sea|ocean", "sand", "boat"]
    part = room.segment(room.add_photo(data)["id"], ", ".join(entries), background)
    chosen = room.resolved(background)
    with Image.open(io.BytesIO(data)) as picture:
        image = torch.tensor(np.asarray(picture))
    expected = segment_image(room.model, image, encode_protocol_classes(room.model, entries, chosen), chosen)
    names = ["background"] * (background is not None) + ["sky", "sea", "sand", "boat"]
    shown = np.array([item["name"] for item in part["classes"]])[unpacked(part["labels"])]
    assert (shown != np.array(names)[expected]).mean() < 1e-3
    assert len(np.unique(shown)) > 1


def test_a_photo_and_a_name_are_encoded_once(tools, room):
    key = room.add_photo(png(tools))["id"]
    room.segment(key, "sea, sand")
    windows, room.model.encode_text = room.model.windows_encoded, None
    assert room.add_photo(png(tools))["id"] == key
    room.segment(key, "sand, sea")
    assert room.model.windows_encoded == windows
    room.add_photo(png(tools, seed=5))
    assert room.model.windows_encoded > windows


def test_the_oldest_photo_is_forgotten(tools, room, monkeypatch):
    monkeypatch.setattr(studio, "MOST_PHOTOS", 2)
    first, second = (room.add_photo(png(tools, seed=seed))["id"] for seed in (1, 2))
    room.segment(first, "sea")
    room.add_photo(png(tools, seed=3))
    room.segment(first, "sea")
    with pytest.raises(UnknownPhoto, match="open it again"):
        room.segment(second, "sea")


def test_names_keep_their_colours_while_the_list_is_edited(tools, room):
    key = room.add_photo(png(tools))["id"]

    def colours(text, background=None):
        return {c["name"]: c["colour"] for c in room.segment(key, text, background)["classes"]}

    before = colours("sky, sea, sand, boat")
    after = colours("rock, boat, sea, sky", 0.9)
    assert len(before) == 4
    assert len(set(after.values())) == len(after) == 5
    assert all(after[name] == before[name] for name in ("boat", "sea", "sky"))
    assert after["rock"] == before["sand"]


def test_class_texts_in_work():
    assert read_class_text(" dog,, sofa|couch,\n red  ball \n") == ["dog", "sofa|couch", "red ball"]
    assert read_class_text("background, dog,cat|") == ["dog", "cat"]
    for text, message in (
        ("", "name at least one class"),
        (" , |,\n", "name at least one class"),
        ("background", "nothing but background"),
        ("dog, Dog", "'Dog' occurs twice"),
        ("dog, background", "a rule, not a name"),
        ("a||b", "empty synonym"),
        ("dog, \ud800", "no text"),
        (",".join(f"thing {number}" for number in range(10_001)), "10001 classes; give at most 10000"),
    ):
        with pytest.raises(UserError, match=message):
            read_class_text(text)


def test_a_list_of_ten_thousand(tools, room):
    key = room.add_photo(png(tools))["id"]
    part = room.segment(key, ",".join(f"thing {number}" for number in range(10_000)))
    assert part["total"] == 10_000
    assert len(part["classes"]) < 200


@pytest.mark.parametrize("data", [b"", b"no picture", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_no_picture_is_refused(room, data):
    with pytest.raises(UserError, match="cannot be read as an image"):
        room.add_photo(data)


def test_formats_that_nobody_photographs_in_stay_out(tools, room):
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(png(tools))) as picture:
        picture.save(buffer, "PCX")
    with pytest.raises(UserError, match="unknown or damaged format"):
        room.add_photo(buffer.getvalue())


def test_too_many_pixels_are_refused_before_decoding(room):
    buffer = io.BytesIO()
    Image.new("1", (8000, 6251)).save(buffer, "PNG")
    with pytest.raises(UserError, match="above the limit of 50000000"):
        room.add_photo(buffer.getvalue())


def test_the_first_class_list_fits_the_protocol(tools):
    lists = [Studio(tools.FakeModel(), protocol(name), name="").classes for name in ("shapes", "official")]
    assert lists[0].startswith("ball, box")
    assert lists[1].startswith("aeroplane, bicycle")


def test_samples_differ_and_repeat():
    samples = [sample_image(number) for number in range(studio.SAMPLES)]
    assert len(set(samples)) == studio.SAMPLES
    assert sample_image(0) == samples[0]
