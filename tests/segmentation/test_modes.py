"""The pictures by name: what each shows, at which size, and bad names."""

import numpy as np
import pytest
import torch
from PIL import Image

from groupvit_fast.console import UserError
from groupvit_fast.segmentation import pictures, protocol
from groupvit_fast.segmentation.colours import BACKGROUND_COLOUR, class_colours
from groupvit_fast.segmentation.modes import MODES, View, parse_modes, save_modes, soft_map_on, view_photo
from groupvit_fast.segmentation.prompts import encode_classes

NAMES = ["sky", "sea", "sand", "boat"]
OFFICIAL = ["input", "pred", "input_pred", "input_pred_label", "first_group", "final_group", "all_groups"]


@pytest.fixture
def make_view(tools):
    def make(shape=(48, 80), threshold=None) -> View:
        model = tools.FakeModel().eval()
        image = tools.blobs(*shape, np.random.default_rng(4))
        knobs = {"short_side": 32, "crop": 32, "stride": 16, "background_threshold": threshold}
        chosen = tools.replace(protocol("official"), **knobs)
        names = ["background"] * (threshold is not None) + NAMES
        return view_photo(model, image, encode_classes(model, NAMES, chosen.templates), chosen, names)

    return make


def test_the_seven_official_modes_come_first():
    assert list(MODES)[:7] == OFFICIAL


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(48, 80), (1, 1), (90, 40)])
def test_every_picture_of_any_shape_is_drawn_and_repeats(make_view, shape, mode):
    view = make_view(shape)
    assert MODES[mode](view).tobytes() == MODES[mode](view).tobytes()


def test_sizes(make_view):
    view = make_view()
    assert view.size == (480, 800)
    for mode in ("input", "pred", "input_pred", "first_group", "final_group"):
        assert MODES[mode](view).size == (800, 480), mode
    assert MODES["mask"](view).size == (80, 48)
    assert MODES["all_groups"](view).height > 2 * 480  # wide photos stand below each other
    assert MODES["all_groups"](make_view((80, 48))).width > 2 * 480


def test_prediction_has_the_colours_of_the_labels_alone(make_view):
    view = make_view()
    found = np.asarray(MODES["pred"](view))
    expected = class_colours(4)[pictures.enlarge(view.labels, (480, 800), smooth=False)]
    assert np.array_equal(found, expected)
    assert len(np.unique(view.labels)) > 1


def test_background_keeps_the_photo_and_is_grey_in_the_prediction(make_view):
    view = make_view(threshold=0.3)
    background = pictures.enlarge(view.labels, view.size, smooth=False) == 0
    assert background.any()
    assert not background.all()
    inside = background & ~pictures.borders(background.astype(int), 2)
    shown, photo = np.asarray(MODES["input_pred"](view)), np.asarray(MODES["input"](view))
    assert np.array_equal(shown[inside], photo[inside])
    assert (shown[~background] != photo[~background]).any(axis=-1).mean() > 0.9
    assert (np.asarray(MODES["pred"](view))[background] == BACKGROUND_COLOUR).all()


def test_the_stages_show_different_groups(make_view):
    view = make_view()
    first, final = view.shown_groups(0), view.shown_groups(1)
    assert len(np.unique(first)) > len(np.unique(final)) > 1
    assert MODES["first_group"](view).tobytes() != MODES["final_group"](view).tobytes()


def test_soft_maps_are_drawn_in_their_window_alone(make_view):
    view = make_view((32, 80))
    maps = torch.cat([encoding.maps[1] @ encoding.maps[0] for encoding in view.photo.encodings])
    maps = maps.unflatten(-1, view.photo.encodings[0].grid)
    groups = maps.shape[1]
    assert len(view.photo.boxes) == 4
    for window, box in enumerate(view.photo.boxes):
        drawn = sum(soft_map_on(maps, view.photo, window * groups + g, (64, 160)) for g in range(groups))
        inside = np.zeros((64, 160), bool)
        inside[:, 2 * box.left : 2 * box.right] = True
        assert drawn[inside] == pytest.approx(1, abs=1e-5)
        assert not drawn[~inside].any()


def test_parse_modes():
    assert parse_modes(" pred , mask,pred") == ["pred", "mask"]
    assert parse_modes("all") == list(MODES)
    with pytest.raises(UserError, match="unknown picture 'final': did you mean"):
        parse_modes("final")
    with pytest.raises(UserError, match="unknown picture ''"):
        parse_modes("pred,")


def test_pictures_are_saved_under_their_names(make_view, tmp_path):
    view = make_view()
    files = save_modes(view, ["pred", "mask"], tmp_path / "new" / "a.b")
    assert files == {mode: str(tmp_path / f"new/a.b_{mode}.png") for mode in ("pred", "mask")}
    with Image.open(files["mask"]) as mask:
        assert np.array_equal(np.asarray(mask), view.labels)
