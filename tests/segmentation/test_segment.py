"""The reference against a second statement in numpy, pixel by pixel, and its single steps."""

import numpy as np
import pytest
import torch

from groupvit_fast.segmentation import Protocol, protocol, segment_image
from groupvit_fast.segmentation.prompts import ClassText, encode_classes
from groupvit_fast.segmentation.segment import (
    best_classes,
    best_name_of_class,
    prepare,
    resized_size,
    window_boxes,
    window_spans,
)

NAMES = ["sky", "sea", "sand", "boat", "tree", "house", "road"]


def bilinear(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[..., h, w] -> [..., *size] in float64, align_corners=False."""
    for axis, wanted in ((-2, size[0]), (-1, size[1])):
        have = values.shape[axis]
        position = np.clip((np.arange(wanted) + 0.5) * have / wanted - 0.5, 0, None)
        below = np.floor(position).astype(int)
        above = np.minimum(below + 1, have - 1)
        weight = position - below
        weight = weight[:, None] if axis == -2 else weight
        values = np.take(values, below, axis) * (1 - weight) + np.take(values, above, axis) * weight
    return values


def softmax(values: np.ndarray, axis: int) -> np.ndarray:
    values = np.exp(values - values.max(axis=axis, keepdims=True))
    return values / values.sum(axis=axis, keepdims=True)


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def official_labels(model, image, text, *, size, crop, stride, threshold) -> np.ndarray:
    """The released evaluation for one class list without synonyms, in float64 loops."""
    pixels = prepare(image, Protocol("", "", short_side=min(size)))
    height, width = pixels.shape[-2:]
    assert (height, width) == size
    classes = len(text.embeddings)
    total, coverage = np.zeros((classes + (threshold is not None), height, width)), np.zeros((height, width))
    tops = sorted({min(top, max(height - crop, 0)) for top in range(0, height, stride)})
    lefts = sorted({min(left, max(width - crop, 0)) for left in range(0, width, stride)})
    tops = [top for index, top in enumerate(tops) if index == 0 or tops[index - 1] + crop < height]
    lefts = [left for index, left in enumerate(lefts) if index == 0 or lefts[index - 1] + crop < width]
    embeddings = text.embeddings.double().numpy()
    scale = min(np.exp(model.logit_scale.item()), 100)
    for top in tops:
        for left in lefts:
            window = pixels[:, top : top + crop, left : left + crop]
            encoding = model.encode_groups(window[None])
            maps = encoding.maps[1][0].double().numpy() @ encoding.maps[0][0].double().numpy()
            member = bilinear(maps.reshape(-1, *encoding.grid), tuple(window.shape[-2:])).argmax(axis=0)
            logits = scale * unit(encoding.groups[0].double().numpy()) @ embeddings.T
            mean_logits = scale * unit(encoding.image[0].double().numpy()) @ embeddings.T
            masked = np.full_like(logits, -np.inf)
            best = np.argsort(-mean_logits)[:5]
            masked[:, best] = logits[:, best]
            table = softmax(logits, 1) * softmax(masked, 1)
            scores = table[member].transpose(2, 0, 1)
            if threshold is not None:
                limit = min(threshold, table.max())
                scores = np.concatenate([(scores.max(axis=0, keepdims=True) < limit) * 1.0, scores])
            place = np.s_[:, top : top + window.shape[1], left : left + window.shape[2]]
            total[place] += scores
            coverage[place[1:]] += 1
    return bilinear(total / coverage, tuple(image.shape[:2])).argmax(axis=0)


@pytest.mark.parametrize("threshold", [None, 0.2, 0.95])
@pytest.mark.parametrize(
    ("shape", "size"),
    [((48, 80), (32, 53)), ((70, 30), (75, 32)), ((32, 32), (32, 32)), ((25, 100), (32, 128))],
)
def test_official_algorithm_in_numpy(tools, shape, size, threshold):
    model = tools.FakeModel().eval()
    image = torch.tensor(tools.blobs(*shape, np.random.default_rng(sum(shape))))
    chosen = tools.replace(
        protocol("official"), short_side=32, crop=32, stride=16, background_threshold=threshold
    )
    text = encode_classes(model, NAMES, chosen.templates)
    labels = segment_image(model, image, text, chosen).numpy()
    expected = official_labels(model, image, text, size=size, crop=32, stride=16, threshold=threshold)
    assert labels.shape == expected.shape == shape
    assert len(np.unique(expected)) >= 2
    assert (labels != expected).mean() <= 2e-3


def test_background_is_lifted_where_no_group_reaches_the_threshold(tools):
    """With a threshold above every score the limit falls to the best score: that group alone stays."""
    model = tools.FakeModel().eval()
    image = torch.tensor(tools.blobs(32, 32, np.random.default_rng(3)))
    chosen = tools.replace(protocol("official"), short_side=32, crop=32, stride=16, background_threshold=1.0)
    text = encode_classes(model, NAMES, chosen.templates)
    capped = segment_image(model, image, text, chosen)
    constant = segment_image(model, image, text, tools.replace(chosen, background_rule="constant"))
    assert set(constant.unique().tolist()) == {0}
    assert len(capped.unique()) == 2


@pytest.mark.parametrize(
    ("length", "crop", "stride", "expected"),
    [
        (448, 448, 224, [(0, 448)]),
        (300, 448, 224, [(0, 300)]),
        (449, 448, 224, [(0, 448), (1, 449)]),
        (597, 448, 224, [(0, 448), (149, 597)]),
        (672, 448, 224, [(0, 448), (224, 672)]),
        (10, 3, 3, [(0, 3), (3, 6), (6, 9), (7, 10)]),
        (1, 5, 2, [(0, 1)]),
    ],
)
def test_window_spans(length, crop, stride, expected):
    assert window_spans(length, crop, stride) == expected


def test_windows_cover_every_pixel(tools):
    chosen = tools.replace(protocol("official"), crop=7, stride=3)
    covered = np.zeros((23, 17), int)
    for box in window_boxes(23, 17, chosen):
        assert box.bottom - box.top == box.right - box.left == 7
        covered[box.slices()] += 1
    assert covered.min() >= 1


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (375, 500, (448, 597)),  # 500 * 448 / 375 = 597.33
        (500, 375, (597, 448)),
        (448, 448, (448, 448)),
        (100, 1000, (205, 2048)),  # the long side's limit decides
        (1, 1, (448, 448)),
        (1, 8000, (1, 2048)),
    ],
)
def test_resized_size_of_the_official_protocol(height, width, expected):
    assert resized_size(height, width, protocol("official")) == expected


def test_prepare_normalises_with_imagenet_statistics(tools):
    image = torch.full((8, 8, 3), 255, dtype=torch.uint8)
    pixels = prepare(image, tools.replace(protocol("shapes"), short_side=8))
    expected = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert pixels[:, 3, 3].tolist() == pytest.approx(expected, rel=1e-6)


def test_a_class_has_the_score_of_its_best_name():
    text = ClassText(torch.eye(4), torch.tensor([0, 0, 1, 2]))
    scores = torch.tensor([[[0.1, 0.4, 0.2, 0.3], [0.5, 0.1, 0.3, 0.1]]])
    assert torch.equal(best_name_of_class(scores, text), torch.tensor([[[0.4, 0.2, 0.3], [0.5, 0.3, 0.1]]]))


def test_the_mean_feature_keeps_all_names_of_the_best_classes():
    text = ClassText(torch.eye(4), torch.tensor([0, 0, 1, 2]))
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    assert best_classes(logits, text, 1).tolist() == [[True, True, False, False]]
    assert best_classes(logits, text, 2).tolist() == [[True, True, True, False]]
    assert best_classes(logits, text, None).all()
    assert best_classes(logits, text, 50).all()
