"""Boundary IoU against distances measured pixel by pixel, and against the definition by erosion."""

import numpy as np
import torch

from groupvit_fast.segmentation.boundary import boundary_counts, near_contour


def near_by_looking(labels: np.ndarray, distance: int) -> np.ndarray:
    padded = np.pad(labels.astype(int), distance, constant_values=-1)
    height, width = labels.shape
    result = np.zeros(labels.shape, bool)
    for y in range(height):
        for x in range(width):
            around = padded[y : y + 2 * distance + 1, x : x + 2 * distance + 1]
            result[y, x] = (around != labels[y, x]).any()
    return result


def test_near_contour():
    rng = np.random.default_rng(0)
    labels = np.kron(rng.integers(0, 3, (4, 5)), np.ones((9, 7), int))
    for distance in (1, 3):
        found = near_contour(torch.tensor(labels), distance).numpy()
        assert (found == near_by_looking(labels, distance)).all()
        assert 0 < found.mean() < 1


def test_counts():
    rng = np.random.default_rng(1)
    target = np.kron(rng.integers(0, 3, (4, 5)), np.ones((30, 20), int))
    target[:, 50] = 255
    prediction = np.roll(np.where(target == 255, 0, target), 2, axis=1)
    distance = round(0.02 * np.hypot(*target.shape))
    assert distance > 1
    near = [near_by_looking(labels, distance) & (target != 255) for labels in (target, prediction)]
    expected = [
        [
            (near[0] & near[1] & (target == k) & (prediction == k)).sum(),
            (near[0] & (target == k)).sum(),
            (near[1] & (prediction == k)).sum(),
        ]
        for k in range(3)
    ]
    counts = boundary_counts(torch.tensor(target), torch.tensor(prediction), 3)
    assert counts.T.tolist() == expected


def test_one_pixel():
    assert boundary_counts(torch.tensor([[1]]), torch.tensor([[1]]), 2).tolist() == [[0, 1]] * 3
