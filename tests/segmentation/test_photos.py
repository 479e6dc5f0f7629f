"""`GroupViT.segment`: the same labels as the reference statement, and clear errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from groupvit_fast.console import UserError
from groupvit_fast.model import create_model
from groupvit_fast.segmentation import protocol, segment_image
from groupvit_fast.segmentation.prompts import encode_classes

LABELS = ["dog", "grass|lawn", "ball"]


@pytest.fixture(scope="module")
def model():
    return create_model("tiny", seed=3)


def photo(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("background", [None, 0.5])
def test_labels_are_those_of_the_reference(model, background):
    photos = [photo(96, 96), photo(40, 70, seed=1)]
    found = model.segment(photos, LABELS, protocol="shapes", background_threshold=background)
    assert model.training
    model.eval()
    chosen = protocol("shapes").resolve(
        dataset="x", background=background is not None, image_size=64, threshold=background
    )
    text = encode_classes(model, LABELS, chosen.templates)
    for image, labels in zip(photos, found, strict=True):
        expected = segment_image(model, torch.tensor(image), text, chosen)
        assert labels.shape == image.shape[:2]
        assert (labels == expected).float().mean() >= 0.9999
        assert labels.max() < len(LABELS) + (background is not None)
    model.train()


def test_no_images_give_no_labels(model):
    assert model.segment([], LABELS, protocol="shapes") == []


@pytest.mark.parametrize(
    ("images", "labels", "options", "message"),
    [
        ([photo(64, 64)], [], {}, "labels is empty"),
        ([photo(64, 64)], ["a", "A"], {}, "occurs twice"),
        ([photo(64, 64)], LABELS, {"protocol": "shape"}, "shapes"),
        ([photo(64, 64).astype(np.float32)], LABELS, {}, "image 0 is torch.float32"),
        ([photo(64, 64), photo(64, 64)[..., :1]], LABELS, {}, r"image 1 is torch.uint8 \(64, 64, 1\)"),
    ],
)
def test_bad_input_is_named(model, images, labels, options, message):
    with pytest.raises(UserError, match=message):
        model.segment(images, labels, **options)
