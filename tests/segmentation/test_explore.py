"""One photo encoded once: the labels of the fast path, scores and groups that fit them, cached names."""

import numpy as np
import pytest
import torch

from groupvit_fast.console import UserError
from groupvit_fast.segmentation import protocol
from groupvit_fast.segmentation.batch import segment_batch
from groupvit_fast.segmentation.evaluation import encode_protocol_classes
from groupvit_fast.segmentation.explore import (
    TextBank,
    encode_photo,
    label_photo,
    score_of_labels,
    score_photo,
    soft_maps,
    stage_groups,
)
from groupvit_fast.segmentation.prompts import encode_classes

NAMES = ["sky", "sea|ocean", "sand", "boat", "tree", "house", "road"]
SLIDING = {"short_side": 32, "crop": 32, "stride": 16}
SIZES = [(48, 80), (32, 32), (25, 100), (61, 32)]


def photo_of(tools, shape, seed=0):
    return torch.tensor(tools.blobs(*shape, np.random.default_rng(seed)))


@pytest.mark.parametrize("name", ["official", "tcl", "sclip"])
@pytest.mark.parametrize("threshold", [None, 0.1])
@pytest.mark.parametrize("shape", SIZES)
def test_labels_and_groups_are_those_of_the_fast_path(tools, shape, threshold, name):
    model, image = tools.FakeModel().eval(), photo_of(tools, shape)
    chosen = tools.replace(protocol(name), **SLIDING, background_threshold=threshold)
    text = encode_protocol_classes(model, NAMES, chosen)
    expected = segment_batch(model, [image], text, chosen)[0]
    encoded = model.windows_encoded
    photo = encode_photo(model, image, chosen)
    assert model.windows_encoded - encoded == len(photo.boxes)
    scores = score_photo(model, photo, text, chosen)
    assert torch.equal(label_photo(scores, shape), expected.labels)
    assert torch.equal(stage_groups(photo, 1, shape), expected.groups)
    assert len(expected.labels.unique()) > 1
    assert scores.groups.shape == (len(photo.boxes), 6, len(NAMES))
    assert 0 <= scores.by_label.min() <= scores.by_label.max() <= 1


def test_another_class_list_costs_no_encoding(tools):
    model, image = tools.FakeModel().eval(), photo_of(tools, (48, 80))
    chosen = tools.replace(protocol("official"), **SLIDING)
    photo, encoded = encode_photo(model, image, chosen), model.windows_encoded
    for names in (NAMES, NAMES[:3], ["something", "else"]):
        text = encode_classes(model, names, chosen.templates)
        found = label_photo(score_photo(model, photo, text, chosen), (48, 80))
        assert model.windows_encoded == encoded
        assert torch.equal(found, segment_batch(model, [image], text, chosen)[0].labels)
        encoded = model.windows_encoded


def test_windows_are_encoded_in_parts(tools, monkeypatch):
    model, image = tools.FakeModel().eval(), photo_of(tools, (32, 200))
    chosen = tools.replace(protocol("official"), **SLIDING)
    whole = encode_photo(model, image, chosen)
    monkeypatch.setattr("groupvit_fast.segmentation.batch.PIXELS_PER_FORWARD", {"cpu": 3 * 32 * 32})
    parts = encode_photo(model, image, chosen)
    assert len(parts.encodings) == len(parts.boxes) == len(whole.boxes) > 6
    for one, other in zip(whole.encodings, parts.encodings, strict=True):
        torch.testing.assert_close(one.groups, other.groups)


@pytest.mark.parametrize("shape", SIZES)
def test_the_score_of_a_label_is_the_largest_one(tools, shape):
    model, image = tools.FakeModel().eval(), photo_of(tools, shape)
    chosen = tools.replace(protocol("official"), **SLIDING)
    text = encode_classes(model, NAMES, chosen.templates)
    scores = score_photo(model, encode_photo(model, image, chosen), text, chosen)
    labels = label_photo(scores, shape)
    full = scores.rows[scores.row_of_pixel].permute(2, 0, 1)
    full = torch.nn.functional.interpolate(full[None], size=shape, mode="bilinear")[0]
    torch.testing.assert_close(score_of_labels(scores, labels), full.amax(dim=0), atol=1e-5, rtol=0)


def test_first_stage_groups_and_soft_maps(tools):
    model, image = tools.FakeModel(groups=6).eval(), photo_of(tools, (32, 48))
    chosen = tools.replace(protocol("official"), **SLIDING)
    photo = encode_photo(model, image, chosen)
    assert len(photo.boxes) == 2
    soft = soft_maps(photo)
    assert soft.shape == (2, 6, 8, 8)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(2, 8, 8))
    first = stage_groups(photo, 0, (32, 48))
    left = torch.nn.functional.interpolate(
        photo.encodings[0].maps[0].unflatten(-1, (8, 8)), size=(32, 32), mode="bilinear"
    )
    assert torch.equal(first[:, :24], left.argmax(dim=1)[0, :, :24])
    assert first[:, 24:].min() >= 12
    assert first.max() < 24


def test_cached_names_give_the_same_text_in_any_order(tools):
    model, chosen = tools.FakeModel().eval(), protocol("official")
    bank, calls = TextBank(model, chosen), []
    encode = model.encode_text
    model.encode_text = lambda tokens: calls.append(len(tokens)) or encode(tokens)
    for names, new in ((NAMES, 8), (NAMES[::-1], 0), (["sea", "lake"], 1)):
        calls.clear()
        found = bank.encode(names)
        assert sum(calls) == new
        expected = encode_classes(model, names, chosen.templates)
        torch.testing.assert_close(found.embeddings, expected.embeddings)
        assert torch.equal(found.owner, expected.owner)


def test_the_cache_of_names_forgets_what_was_used_longest_ago(tools):
    bank = TextBank(tools.FakeModel().eval(), protocol("official"), capacity=2)
    bank.encode(["a", "b"])
    bank.encode(["a"])
    bank.encode(["c"])
    assert list(bank._rows) == ["a", "c"]
    assert len(bank.encode(["x", "y", "z"]).embeddings) == 3
    assert len(bank._rows) == 2


def test_damaged_weights_are_named(tools):
    model = tools.FakeModel().eval()
    model.words[:] = float("nan")
    with pytest.raises(UserError, match="text encoder gives NaN"):
        TextBank(model, protocol("official")).encode(NAMES)
    model.names[:] = float("nan")
    with pytest.raises(UserError, match="model gives NaN"):
        encode_photo(model, photo_of(tools, (32, 32)), tools.replace(protocol("official"), **SLIDING))
