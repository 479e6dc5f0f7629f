import numpy as np
import pytest

from groupvit_fast.data import sampling


def test_epoch_order_is_a_permutation_that_depends_on_seed_and_epoch():
    orders = [sampling.epoch_order(1000, seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(1000))
    assert len({order.tobytes() for order in orders}) == 6
    assert np.array_equal(orders[1], sampling.epoch_order(1000, 0, 1))
    assert sampling.epoch_order(8, 0, 0).tolist() == [5, 3, 7, 2, 4, 1, 0, 6], "saved runs rely on this order"


def test_draws_belong_to_positions_not_to_batches():
    whole = sampling.draws(3, 100, 50)
    assert np.array_equal(whole[10:30], sampling.draws(3, 110, 20))
    assert not np.array_equal(whole, sampling.draws(4, 100, 50))
    assert len(np.unique(whole)) == whole.size
    assert sampling.draws(0, 2**56, 2).shape == (2, sampling.DRAWS), "far positions do not overflow"


def test_uniform_fills_the_half_open_unit_interval():
    values = sampling.uniform(sampling.draws(0, 0, 2000))
    assert values.min() >= 0
    assert values.max() < 1
    assert np.abs(np.histogram(values, 10, (0, 1))[0] / values.size - 0.1).max() < 0.005
    assert sampling.uniform(np.array([2**64 - 1], np.uint64))[0] < 1


def test_crop_windows_follow_the_random_resized_crop_rule():
    count, width, height = 20000, 160, 120
    sizes = np.full(count, width), np.full(count, height)
    x, y, w, h = sampling.crop_windows(*sizes, sampling.draws(0, 0, count), 0.08).T
    assert x.min() == 0
    assert y.min() == 0
    assert (x + w).max() == width
    assert (y + h).max() == height
    area, ratio = w * h / (width * height), w / h
    assert 0.07 < area.min() < 0.1
    assert area.max() > 0.95
    small = area < 0.5  # big windows are often redrawn, small ones keep their distribution
    assert abs(np.median(np.log(ratio[small]))) < 0.02
    assert 0.72 < ratio[small].min() < 0.78
    assert 1.28 < ratio[small].max() < 1.38
    thirds = np.histogram(area, [0.1, 0.2, 0.3, 0.4])[0]
    assert np.abs(thirds / thirds.mean() - 1).max() < 0.08, "the area is uniform where every try fits"
    spare = width - w
    assert set(x[spare == 5]) == set(range(6)), "every place is reached, both ends included"
    assert abs(np.mean(x[spare > 20] / spare[spare > 20]) - 0.5) < 0.01


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [(20000, 20, (9986, 0, 27, 20)), (10, 1000, (0, 493, 10, 13)), (1, 1, (0, 0, 1, 1))],
)
def test_extreme_shapes_fall_back_to_the_centre(width, height, expected):
    windows = sampling.crop_windows(np.full(50, width), np.full(50, height), sampling.draws(1, 0, 50), 0.5)
    assert tuple(windows[0]) == expected
    assert (windows == windows[0]).all()


def test_whole_image_when_the_least_area_is_all_of_it():
    windows = sampling.crop_windows(
        np.full(9, 64), np.full(9, 64), sampling.draws(1, 0, 9), 1.0, ratio=(1, 1)
    )
    assert (windows == (0, 0, 64, 64)).all()
