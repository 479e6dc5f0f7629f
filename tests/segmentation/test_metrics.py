"""Scores against counting in plain Python, and the cases at the border."""

import math

import numpy as np
import pytest
import torch

from groupvit_fast.segmentation import metrics

RNG = np.random.default_rng(0)


def random_labels(count: int, classes: int, ignored: float = 0.1):
    target = RNG.integers(0, classes, count)
    target[RNG.random(count) < ignored] = 255
    prediction = np.where(RNG.random(count) < 0.5, target, RNG.integers(0, classes, count))
    prediction[prediction == 255] = 0
    return target, prediction


@pytest.mark.parametrize(("count", "classes"), [(1, 1), (50, 2), (5000, 7), (3000, 171), (4000, 254)])
def test_confusion_and_iou_by_counting(count, classes):
    target, prediction = random_labels(count, classes)
    confusion = metrics.confusion_matrix(torch.tensor(target), torch.tensor(prediction), classes)
    assert confusion.dtype == torch.int64
    expected = np.zeros((classes, classes), int)
    for true, predicted in zip(target, prediction, strict=True):
        if true != 255:
            expected[true, predicted] += 1
    assert confusion.tolist() == expected.tolist()

    counted = target != 255
    ious = []
    for k in range(classes):
        union = ((target == k) | (prediction == k))[counted].sum()
        ious.append(((target == k) & (prediction == k))[counted].sum() / union if union else math.nan)
    np.testing.assert_allclose(metrics.class_iou(confusion).numpy(), ious)
    expected_mean = np.nanmean(ious) if not np.isnan(ious).all() else math.nan
    assert metrics.mean_iou(confusion) == pytest.approx(expected_mean, nan_ok=True)
    expected_accuracy = (target == prediction)[counted].mean() if counted.any() else math.nan
    counts = metrics.class_counts(confusion)
    assert metrics.pixel_accuracy(counts) == pytest.approx(expected_accuracy, nan_ok=True)
    maps = torch.tensor(target), torch.tensor(prediction)
    assert torch.equal(counts, metrics.class_counts_of_maps(*maps, classes))


def test_counts_add_up_over_parts():
    target, prediction = map(torch.tensor, random_labels(4000, 5))
    parts = [
        metrics.confusion_matrix(*pair, 5)
        for pair in zip(target.split(333), prediction.split(333), strict=True)
    ]
    assert torch.equal(sum(parts), metrics.confusion_matrix(target, prediction, 5))


def test_a_class_that_never_occurs_is_left_out_of_the_mean():
    confusion = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    assert metrics.class_iou(confusion)[2].isnan()
    assert metrics.mean_iou(confusion) == pytest.approx((3 / 4 + 4 / 5) / 2)


def test_a_class_that_is_only_predicted_counts_as_zero():
    confusion = torch.tensor([[3, 0, 1], [0, 4, 0], [0, 0, 0]])
    assert metrics.mean_iou(confusion) == pytest.approx((3 / 4 + 1 + 0) / 3)


def test_nothing_labelled_gives_nan():
    empty = metrics.confusion_matrix(torch.full((4, 4), 255), torch.zeros(4, 4, dtype=torch.long), 3)
    assert empty.sum() == 0
    assert math.isnan(metrics.mean_iou(empty))
    assert math.isnan(metrics.pixel_accuracy(metrics.class_counts(empty)))
    nothing = torch.zeros(0, dtype=torch.long)
    assert metrics.confusion_matrix(nothing, nothing, 3).tolist() == [[0] * 3] * 3


@pytest.mark.parametrize(("target", "prediction"), [([3], [0]), ([0], [3]), ([-1], [0]), ([0], [-1])])
def test_labels_out_of_range_are_refused(target, prediction):
    with pytest.raises(ValueError, match="labels must be 0 to 2"):
        metrics.confusion_matrix(torch.tensor(target), torch.tensor(prediction), 3)
    with pytest.raises(ValueError, match="labels must be 0 to 2"):
        metrics.class_counts_of_maps(torch.tensor(target), torch.tensor(prediction), 3)


def test_maps_of_different_size_are_refused():
    with pytest.raises(ValueError, match="differ in size"):
        metrics.confusion_matrix(torch.zeros(2, 3), torch.zeros(3, 2), 3)


def test_counts_beyond_32_bits():
    confusion = torch.tensor([[2**40, 2**39], [0, 2**40]])
    assert metrics.mean_iou(confusion) == pytest.approx((2 / 3 + 2 / 3) / 2)


def test_largest_class_everywhere():
    target, prediction = random_labels(2000, 4)
    confusion = metrics.confusion_matrix(torch.tensor(target), torch.tensor(prediction), 4)
    largest = np.bincount(target[target != 255]).argmax()
    constant = metrics.confusion_matrix(torch.tensor(target), torch.full((2000,), int(largest)), 4)
    counts = metrics.largest_class_counts(metrics.class_counts(confusion))
    assert torch.equal(counts, metrics.class_counts(constant))


def test_oracle_gives_each_group_its_most_frequent_class():
    target, _ = random_labels(3000, 5)
    groups = RNG.integers(0, 9, 3000)
    groups[groups == 4] = 3  # group 4 owns nothing
    histogram, _ = metrics.group_histograms(
        torch.tensor(target), torch.zeros(3000, dtype=torch.long), torch.tensor(groups), 9, 5
    )
    prediction = np.zeros(3000, int)
    for group in range(9):
        members = target[(groups == group) & (target != 255)]
        prediction[groups == group] = np.bincount(members, minlength=5).argmax() if len(members) else 0
    expected = metrics.confusion_matrix(torch.tensor(target), torch.tensor(prediction), 5)
    assert torch.equal(metrics.oracle_counts(histogram), metrics.class_counts(expected))


def test_oracle_is_never_below_the_prediction():
    """No naming of the same groups can label more pixels right."""
    for _ in range(20):
        target, _ = random_labels(500, 4)
        groups = RNG.integers(0, 6, 500)
        prediction = RNG.integers(0, 4, 6)[groups]
        maps = torch.tensor(target), torch.tensor(prediction), torch.tensor(groups)
        truth, _ = metrics.group_histograms(*maps, 6, 4)
        oracle = metrics.pixel_accuracy(metrics.oracle_counts(truth))
        assert oracle >= metrics.pixel_accuracy(metrics.class_counts_of_maps(*maps[:2], 4))


def test_group_numbers_may_pass_255():
    target = torch.tensor([0, 1, 255, 1])
    groups = torch.tensor([255, 256, 255, 299])
    truth, named = metrics.group_histograms(target, torch.tensor([1, 1, 1, 0]), groups, 300, 2)
    assert truth[255].tolist() == [1, 0]
    assert truth[256].tolist() == [0, 1]
    assert named[255].tolist() == [0, 1]
    assert truth.sum() == named.sum() == 3


def test_named_groups():
    truth = torch.tensor(
        [
            [80, 20, 0],  # pure at exactly 80 %, right
            [79, 21, 0],  # not pure
            [0, 300, 0],  # pure, wrong
            [0, 0, 4],  # pure but a speck: 4 of 503 pixels
            [0, 0, 0],  # nothing
            [0, 0, 4],  # alone in the second image: pure, right
        ]
    )
    predicted = torch.tensor([[51, 49, 0], [100, 0, 0], [300, 0, 0], [0, 0, 4], [0, 0, 0], [0, 0, 4]])
    image_of_group = torch.tensor([0, 0, 0, 0, 0, 1])
    assert metrics.named_groups(truth, predicted, image_of_group) == (3, 2)


def test_best_masks_by_looking_at_each():
    labels, _ = random_labels(600, 4)
    groups = RNG.integers(0, 5, 600)
    image = np.repeat([0, 1], 300)
    owner = torch.tensor(groups + 5 * image)
    truth, _ = metrics.group_histograms(torch.tensor(labels), torch.zeros(600).long(), owner, 10, 4)
    expected = []
    for number in (0, 1):
        for k in range(4):
            true = (labels == k) & (image == number)
            masks = [(groups == g) & (image == number) & (labels != 255) for g in range(5)]
            if true.any():
                expected.append(max((true & mask).sum() / (true | mask).sum() for mask in masks))
    count, best = metrics.best_masks(truth, torch.tensor([0] * 5 + [1] * 5))
    assert count == len(expected)
    np.testing.assert_allclose(best.numpy(), expected)


def test_more_than_254_classes_have_another_ignored_label():
    target = torch.tensor([255, 65535, 300, 7])
    prediction = torch.tensor([255, 3, 300, 255])
    confusion = metrics.confusion_matrix(target, prediction, 301)
    assert confusion.sum() == 3
    assert confusion[255, 255] == confusion[300, 300] == confusion[7, 255] == 1
    assert torch.equal(metrics.class_counts(confusion), metrics.class_counts_of_maps(target, prediction, 301))


def test_bootstrap_interval():
    """The interval of a mean of one class is that of a binomial share; equal images have none."""
    generator = torch.Generator().manual_seed(0)
    right = (torch.rand(400, generator=generator) < 0.7).long()
    counts = torch.stack([right, torch.ones(400).long(), right], dim=1)[:, :, None]
    low, high = metrics.bootstrap_interval(counts)
    share = right.float().mean().item()
    deviation = (share * (1 - share) / 400) ** 0.5
    assert low == pytest.approx(share - 1.96 * deviation, abs=0.01)
    assert high == pytest.approx(share + 1.96 * deviation, abs=0.01)
    equal = counts[:1].expand(30, -1, -1)
    assert metrics.bootstrap_interval(equal) == (right[0], right[0])
    assert metrics.bootstrap_interval(counts) == (low, high)
    assert math.isnan(metrics.bootstrap_interval(counts[:0])[0])


@pytest.mark.parametrize("classes", [3, 21])
def test_torchmetrics_agrees(classes):
    oracle = pytest.importorskip("torchmetrics.functional.classification")
    target, prediction = map(torch.tensor, random_labels(5000, classes))
    counts = metrics.class_counts_of_maps(target, prediction, classes)
    options = {"num_classes": classes, "ignore_index": 255}
    jaccard = oracle.multiclass_jaccard_index(prediction, target, average="none", **options)
    np.testing.assert_allclose(metrics.iou(counts), jaccard, rtol=1e-6)
    matrix = oracle.multiclass_confusion_matrix(prediction, target, **options)
    assert torch.equal(metrics.confusion_matrix(target, prediction, classes), matrix)
    recall = oracle.multiclass_accuracy(prediction, target, average="none", **options)
    np.testing.assert_allclose(metrics.accuracy(counts), recall, rtol=1e-6)
