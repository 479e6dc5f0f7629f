"""Labels of a resized score map: uniform pixels, blended ones, compiled loops against tensor operations."""

import numpy as np
import pytest
import torch

from groupvit_fast import ops
from groupvit_fast.data.native import native_module
from groupvit_fast.segmentation import blending, decode, protocol
from groupvit_fast.segmentation.batch import segment_batch
from groupvit_fast.segmentation.blending import Taps, bilinear_taps, resize_labels, uniform_cells
from groupvit_fast.segmentation.labelling import BestChannel, LateSoftmax
from groupvit_fast.segmentation.prompts import encode_classes

NATIVE = native_module("label_uniform_pixels")
compiled = pytest.mark.skipif(NATIVE is None, reason="nothing was compiled")
RULES = {
    "best channel": BestChannel(),
    "late": LateSoftmax(torch.arange(9) // 2, None),
    "late with a threshold": LateSoftmax(torch.arange(9) // 2, 0.2),
}


def test_uniform_cells_by_looking_at_each():
    kinds = torch.randint(0, 2, (30, 20), generator=torch.Generator().manual_seed(0))
    cells = uniform_cells(kinds)
    for y in range(30):
        for x in range(20):
            same = len(kinds[y : y + 2, x : x + 2].unique()) == 1
            assert cells[y, x] == (kinds[y, x] if same else -1)
    assert uniform_cells(kinds[:1, :1]).tolist() == kinds[:1, :1].tolist()


def test_bilinear_taps_match_interpolate():
    rng = np.random.default_rng(0)
    for source, wanted in [(1, 5), (5, 1), (7, 7), (4, 9), (31, 12), *rng.integers(1, 60, (20, 2)).tolist()]:
        values = torch.rand(source)
        taps = bilinear_taps(source, wanted, values)
        assert isinstance(taps, Taps)
        expected = torch.nn.functional.interpolate(
            values[None, None], wanted, mode="linear", align_corners=False
        )
        mixed = values[taps.first] * (1 - taps.weight) + values[taps.second] * taps.weight
        torch.testing.assert_close(mixed, expected[0, 0])


def test_a_big_output_is_cut_into_bands(tools, monkeypatch):
    model = tools.FakeModel().eval()
    chosen = tools.replace(protocol("official"), mode="whole", short_side=32)
    text = encode_classes(model, list("abcdefg"), chosen.templates)
    image = torch.tensor(tools.blobs(90, 70, np.random.default_rng(1)))
    with ops.use_backend("reference"):  # the compiled loop needs no bands
        whole = segment_batch(model, [image], text, chosen)[0]
    monkeypatch.setattr(blending, "PIXELS_PER_BAND", 7 * 70)
    monkeypatch.setattr(blending, "SCORES_PER_BLEND", 11)
    with ops.use_backend("reference"):
        assert torch.equal(segment_batch(model, [image], text, chosen)[0].labels, whole.labels)


def regions(height, width, count, rng) -> torch.Tensor:
    """int32 [height, width]: numbers of nearest points, so that there are borders in every direction."""
    y, x = np.mgrid[:height, :width]
    points = rng.uniform(0, 1, (count, 2)) * (height, width)
    return torch.tensor(
        np.argmin([(y - a) ** 2 + (x - b) ** 2 for a, b in points], axis=0), dtype=torch.int32
    )


SIZES = [
    (40, 61, 30, 47),
    (13, 8, 50, 31),
    (1, 1, 5, 4),
    (1, 9, 3, 9),
    (9, 1, 9, 3),
    (30, 40, 1, 1),
    (64, 64, 64, 63),
]


@compiled
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", SIZES)
def test_the_compiled_loop_gives_the_labels_of_the_tensor_operations(monkeypatch, rule, size):
    rng = np.random.default_rng(sum(size))
    calls = []
    real = NATIVE.label_uniform_pixels
    monkeypatch.setattr(NATIVE, "label_uniform_pixels", lambda *a: calls.append(1) or real(*a))
    seen = set()
    for count in (1, 2, 7, 60):
        rows = torch.tensor(rng.normal(size=(count, 9)), dtype=torch.float32)
        row_of_pixel = regions(*size[:2], count, rng)
        found = resize_labels(row_of_pixel, rows, size[2:], RULES[rule])
        with ops.use_backend("reference"):
            expected = resize_labels(row_of_pixel, rows, size[2:], RULES[rule])
        assert torch.equal(found, expected)
        assert found.dtype == torch.int64
        seen |= set(found.unique().tolist())
    assert len(calls) == 4
    assert len(seen) > 1


@compiled
def test_a_line_that_is_not_dense_is_read_right():
    """A part of a larger map, as a slice."""
    rng = np.random.default_rng(0)
    rows = torch.tensor(rng.normal(size=(7, 5)), dtype=torch.float32)
    whole = regions(40, 50, 7, rng)
    part = whole[5:30, 10:40]
    found = resize_labels(part, rows, (33, 21), BestChannel())
    assert torch.equal(found, resize_labels(part.clone(), rows, (33, 21), BestChannel()))


@compiled
def test_picked_pixels_are_those_of_the_tensor_operations():
    rng = np.random.default_rng(1)
    source = torch.tensor(rng.integers(-300, 300, (20, 30)), dtype=torch.int16)
    rows, columns = (torch.tensor(rng.integers(0, n, 11)) for n in source.shape)
    target = torch.zeros(20, 40, dtype=torch.int32)
    decode.place_pixels(source, rows, columns, 70_000, target[3:14, 5:16])
    expected = torch.zeros_like(target)
    with ops.use_backend("reference"):
        decode.place_pixels(source, rows, columns, 70_000, expected[3:14, 5:16])
    assert torch.equal(target, expected)
    assert (target != 0).sum() > 100


@compiled
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": np.full((3, 4), 5, np.int32)}, "not in the table"),
        ({"rows": np.full((3, 4), -1, np.int32)}, "not in the table"),
        ({"rows": np.zeros((3, 4), np.int64)}, "incompatible"),
        ({"rows": np.zeros((0, 4), np.int32)}, "rows and labels"),
        ({"kinds": np.full(5, 2, np.int32)}, "numbers of labels"),
        ({"line": np.array([0, 3], np.int32)}, "line must fit"),
        ({"line": np.array([0], np.int32)}, "line must fit"),
        ({"spot": np.array([0, 4], np.int32)}, "spot must fit"),
        ({"spot": np.array([0, -1], np.int32)}, "spot must fit"),
        ({"labels": np.zeros((2, 3), np.int64)}, "spot must fit"),
    ],
)
def test_no_memory_is_touched_outside_the_arrays(change, message):
    arrays = {
        "rows": np.zeros((3, 4), np.int32),
        "kinds": np.zeros(5, np.int32),
        "names": np.zeros(2, np.int64),
        "line": np.array([0, 2], np.int32),
        "spot": np.array([1, 3], np.int32),
        "labels": np.zeros((2, 2), np.int64),
    }
    assert len(NATIVE.label_uniform_pixels(**arrays)) == 0
    with pytest.raises((ValueError, TypeError), match=message):
        NATIVE.label_uniform_pixels(**arrays | change)


@compiled
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"line": np.array([0, 3])}, "line must fit"),
        ({"spot": np.array([0, -1, 0])}, "spot must fit"),
        ({"target": np.zeros((3, 3), np.int32)}, "line must fit"),
        ({"target": np.zeros((2, 6), np.int32)[:, ::2]}, "dense"),
    ],
)
def test_pixels_are_picked_inside_the_arrays(change, message):
    arrays = {
        "source": np.zeros((3, 4), np.int16),
        "line": np.array([0, 2]),
        "spot": np.array([0, 3, 1]),
        "added": 1,
        "target": np.zeros((2, 3), np.int32),
    }
    NATIVE.pick_pixels(**arrays)
    assert (arrays["target"] == 1).all()
    with pytest.raises(ValueError, match=message):
        NATIVE.pick_pixels(**arrays | change)


def test_small_classes_give_their_pixels_to_the_best_of_the_rest():
    """By hand: class 2 has 1 of the 9 pixels that are not background, class 1 the others."""
    rows = torch.tensor([[9.0, 0, 0, 0], [0, 9, 0, 0], [0, 4, 9, 0], [5, 4, 9, 0], [0, 0, 0, 0]])
    row_of_pixel = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 1, 1], [2, 1, 1]], dtype=torch.int32)
    owner = torch.arange(4)

    def labels(index, threshold, area):
        return resize_labels(index, rows, index.shape, LateSoftmax(owner, threshold, area)).tolist()

    kept = [[0, 0, 0], [1, 1, 1], [1, 1, 1], [2, 1, 1]]
    assert labels(row_of_pixel, 0.0, None) == labels(row_of_pixel, 0.0, 0.11) == kept
    assert labels(row_of_pixel, 0.0, 0.112) == [[0, 0, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1]]
    row_of_pixel[3, 0] = 3  # the best of the rest is background
    assert labels(row_of_pixel, 0.0, 0.112)[3][0] == 0
    row_of_pixel[3, 0] = 2  # the best of the rest has a probability of 0.007, which stays what it was
    assert labels(row_of_pixel, 0.006, 0.112)[3][0] == 1
    assert labels(row_of_pixel, 0.007, 0.112)[3][0] == 0
    every = torch.tensor([[1, 2]], dtype=torch.int32)
    assert labels(every, 0.0, 0.5) == [[0, 0]]  # a share equal to the threshold is small
    assert labels(torch.zeros(2, 2, dtype=torch.int32), 0.0, 0.5) == [[0, 0], [0, 0]]
