"""Pictures: colours, borders, names where regions are, and files that are whole or absent."""

import io

import numpy as np
import pytest
from PIL import Image

from groupvit_fast.segmentation import pictures
from groupvit_fast.segmentation.colours import BACKGROUND_COLOUR, class_colours, group_colours
from groupvit_fast.segmentation.pictures import Example, grid_picture, labelled_overlay, overlay, paint

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)
HALVES = np.zeros((40, 60), int)
HALVES[:, 30:] = 1


@pytest.mark.parametrize("colours", [class_colours(30), group_colours(16)])
def test_colours_differ(colours):
    distance = np.linalg.norm(colours[:, None].astype(float) - colours[None], axis=-1)
    assert distance[~np.eye(len(colours), dtype=bool)].min() > 12


def test_first_colours_differ_strongly():
    colours = class_colours(10).astype(float)
    distance = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
    assert distance[~np.eye(10, dtype=bool)].min() > 40


def test_colours_do_not_depend_on_how_many_there_are():
    assert np.array_equal(class_colours(50)[:7], class_colours(7))
    assert tuple(class_colours(5, background=True)[0]) == BACKGROUND_COLOUR
    assert np.array_equal(class_colours(5, background=True)[1:], class_colours(4))


def test_paint_leaves_unknown_labels_white():
    colours = class_colours(2)
    painted = paint(np.array([[0, 1, 255, -1]]), colours)
    assert painted.tolist() == [[*colours.tolist(), [255] * 3, [255] * 3]]


def test_borders_lie_on_both_sides_of_a_change():
    labels = np.zeros((5, 8), int)
    labels[:, 4:] = 3
    assert np.flatnonzero(pictures.borders(labels, 1)[2]).tolist() == [3, 4]
    assert np.flatnonzero(pictures.borders(labels, 2)[2]).tolist() == [2, 3, 4, 5]
    assert np.flatnonzero(pictures.borders(labels.T, 1)[:, 2]).tolist() == [3, 4]
    assert not pictures.borders(np.zeros((4, 4), int)).any()


def test_borders_at_the_rim_do_not_wrap_around():
    labels = np.zeros((4, 6), int)
    labels[:, 0] = 1
    labels[0] = 2
    border = pictures.borders(labels, 2)
    assert not border[:, 5][3:].any()
    assert not border[3, 4:].any()


def test_overlay_mixes_grey_and_colour():
    colours = np.array([[200, 0, 100], [0, 0, 0]], np.uint8)
    image = np.full((2, 2, 3), (10, 20, 30), np.uint8)
    mixed = overlay(image, np.zeros((2, 2), int), colours, opacity=0.5, line=0)
    grey = 0.299 * 10 + 0.587 * 20 + 0.114 * 30
    assert mixed[0, 0].tolist() == [round((grey + channel) / 2) for channel in (200, 0, 100)]


def test_background_keeps_the_photo():
    mixed = overlay(PHOTO, HALVES, class_colours(2, background=True), clear=0)
    assert np.array_equal(mixed[:, :28], PHOTO[:, :28])
    assert not np.array_equal(mixed[:, 32:], PHOTO[:, 32:])
    assert (mixed[:, 29:31] == 255).all()


def test_deepest_point():
    mask = np.zeros((20, 30), bool)
    mask[2:5, 1:9] = True
    mask[8:17, 12:25] = True
    row, column, depth = pictures.deepest_point(mask)
    assert (row, depth) == (12, 4)
    assert 16 <= column <= 20
    assert pictures.deepest_point(np.ones((1, 1), bool)) == (0, 0, 0)


def test_names_are_written_on_large_regions_only():
    labels = np.zeros((120, 200), int)
    labels[:, 100:] = 1
    labels[3:6, 3:6] = 2
    plain = Image.new("RGB", (200, 120), "white")
    picture = plain.copy()
    pictures.write_names(picture, labels, ["left", "", "speck"])
    changed = np.asarray(picture) != np.asarray(plain)
    assert changed[40:80, 20:80].any()
    assert not changed[:, 100:].any()
    assert not changed[:12, :12].any()


def test_names_stay_inside_the_picture():
    labels = np.zeros((60, 200), int)
    labels[:, 160:] = 1
    picture = Image.new("RGB", (200, 60), "white")
    pictures.write_names(picture, labels, ["", "a long name"])
    assert (np.asarray(picture)[:, -2:] == 255).all()
    assert (np.asarray(picture) != 255).any()


def test_legend_wraps():
    names = [f"a rather long class name {index}" for index in range(9)]
    wide, narrow = (pictures.legend(names, class_colours(9), width) for width in (5000, 300))
    assert wide.width == 5000
    assert narrow.height >= 9 * 20
    assert wide.height < 40


def test_label_maps_are_enlarged_without_new_values():
    large = pictures.enlarge(HALVES, (123, 457), smooth=False)
    assert large.shape == (123, 457)
    assert set(np.unique(large)) == {0, 1}
    many = RNG.integers(0, 100_000, (8, 8))
    assert np.array_equal(pictures.enlarge(many, (16, 16), smooth=False)[::2, ::2], many)


@pytest.mark.parametrize("truth", [None, HALVES])
@pytest.mark.parametrize("count", [1, 3, 4, 5])
def test_grid(count, truth):
    examples = [Example(PHOTO, HALVES, HALVES * 3, truth) for _ in range(count)]
    picture = grid_picture(examples, ["sea", "sand"], title="a title")
    columns = (4 if truth is not None else 3) * (1 if count < 4 else 2)
    assert columns * pictures.TILE < picture.width < (columns + 1) * (pictures.TILE + 2 * pictures.GAP)
    assert grid_picture(examples, ["sea", "sand"], title="a title").tobytes() == picture.tobytes()


def test_grid_of_photos_of_any_shape():
    examples = []
    for height, width in ((1, 1), (3, 500), (300, 4), (64, 64)):
        labels = np.full((height, width), 255)
        photo = np.zeros((height, width, 3), np.uint8)
        examples.append(Example(photo, labels * 0, labels * 0, labels))
    grid_picture(examples, ["sea"])


def test_labelled_overlay_is_large_enough_to_read():
    picture = labelled_overlay(PHOTO, HALVES, ["sea", "sand"])
    assert min(picture.size) >= 480
    legend_only_for = labelled_overlay(PHOTO, HALVES * 0, ["sea", "sand"])
    assert np.asarray(picture)[-20:].std() > np.asarray(legend_only_for)[-20:].std()


@pytest.mark.parametrize("shape", [(1, 1), (3000, 4000), (2, 3000), (5000, 3)])
def test_labelled_overlay_of_any_shape(shape):
    picture = labelled_overlay(np.zeros((*shape, 3), np.uint8), np.zeros(shape, int), ["sea"])
    assert max(picture.size) <= pictures.MAX_SIDE + 60


def test_mask_picture_holds_the_labels():
    buffer = io.BytesIO()
    pictures.mask_picture(HALVES, class_colours(2)).save(buffer, "PNG")
    with Image.open(buffer) as mask:
        assert mask.mode == "P"
        assert np.array_equal(np.asarray(mask), HALVES)
        assert np.array_equal(np.asarray(mask.convert("RGB"))[0, 0], class_colours(2)[0])
    many = HALVES * 300
    with_many = pictures.mask_picture(many, class_colours(301))
    assert np.array_equal(np.asarray(with_many), many)


def test_a_file_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "new" / "picture.png"
    pictures.save_atomically(Image.new("RGB", (4, 4)), path)
    before = path.read_bytes()
    monkeypatch.setattr(
        Image.Image, "save", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        pictures.save_atomically(Image.new("RGB", (8, 8)), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
