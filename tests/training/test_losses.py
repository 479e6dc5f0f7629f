"""The losses against plain statements of their definitions: one-hot targets, explicit loops over texts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from groupvit_fast.training.losses import (
    GROUP_SHARPNESS,
    contrastive_loss,
    multi_label_loss,
    sigmoid_loss,
    similarity_scale,
    soft_maximum,
    text_labels,
)

SCALE = torch.tensor(math.log(1 / 0.07))


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_contrastive(image, text, scale):
    logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    target = torch.arange(len(image))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def plain_multi_label(image, prompts, labels, scale, dtype=torch.float32):
    """Distinct texts once, soft targets spelled out."""
    image = F.normalize(image, dim=-1)
    places = {}
    for row in range(labels.shape[0]):
        for column in range(labels.shape[1]):
            places.setdefault(labels[row, column].item(), []).append((row, column))
    texts = F.normalize(torch.stack([prompts[where[0]] for where in places.values()]), dim=-1)
    owns = torch.zeros(len(image), len(places), dtype=dtype)
    for number, where in enumerate(places.values()):
        for row, _ in where:
            owns[row, number] = 1.0
    logits = scale * image @ texts.T
    image_loss = F.cross_entropy(logits, owns / owns.sum(1, keepdim=True))
    text_loss = F.cross_entropy(logits.T, owns.T / owns.T.sum(1, keepdim=True))
    return (image_loss + text_loss) / 2


def test_contrastive_is_symmetric_cross_entropy():
    image, text = features(7, 5), features(7, 5, seed=1)
    expected = plain_contrastive(image, text, SCALE.exp())
    torch.testing.assert_close(contrastive_loss(image, text, SCALE), expected)


def test_contrastive_ignores_the_length_of_features():
    image, text = features(7, 5), features(7, 5, seed=1)
    torch.testing.assert_close(contrastive_loss(3 * image, text, SCALE), contrastive_loss(image, text, SCALE))


def test_multi_label_without_repeats_is_the_published_formula():
    """Soft targets 1/K for an image's own prompts, one-hot for each prompt."""
    image, prompts = features(6, 5), features(6, 3, 5, seed=1)
    labels = torch.arange(18).view(6, 3)
    logits = SCALE.exp() * F.normalize(image, dim=-1) @ F.normalize(prompts, dim=-1).flatten(0, 1).T
    soft = torch.eye(6).repeat_interleave(3, dim=1) / 3
    one_hot = torch.arange(6).repeat_interleave(3)
    expected = (F.cross_entropy(logits, soft) + F.cross_entropy(logits.T, one_hot)) / 2
    torch.testing.assert_close(multi_label_loss(image, prompts, labels, SCALE), expected)


@pytest.mark.parametrize(
    ("images", "prompts", "texts"), [(6, 3, 5), (8, 2, 3), (5, 4, 1), (1, 1, 1), (9, 3, 27)]
)
def test_repeated_prompts_count_once(images, prompts, texts):
    labels = torch.randint(texts, (images, prompts), generator=torch.Generator().manual_seed(2))
    table = features(texts, 5, seed=1).requires_grad_()
    image = features(images, 5).requires_grad_()
    loss = multi_label_loss(image, table[labels], labels, SCALE)
    expected = plain_multi_label(image, table[labels], labels, SCALE.exp())
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss, (image, table))
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (image, table)), atol=1e-5, rtol=1e-4)


def test_merged_captions_are_not_each_others_negatives():
    image = features(4, 5)
    captions = features(2, 5, seed=1)
    labels = torch.tensor([0, 1, 0, 1])
    merged = contrastive_loss(image, captions[labels], SCALE, labels=labels)
    torch.testing.assert_close(
        merged, plain_multi_label(image, captions[labels][:, None], labels[:, None], SCALE.exp())
    )
    assert merged < contrastive_loss(image, captions[labels], SCALE)


def test_groups_match_a_prompt_as_well_as_their_best_does():
    """One group makes no difference; a group of an image that fits beats a mean that does not."""
    labels = torch.arange(12).view(4, 3)
    image, prompts = features(4, 5), features(4, 3, 5, seed=1)
    expected = multi_label_loss(image, prompts, labels, SCALE)
    torch.testing.assert_close(multi_label_loss(image[:, None], prompts, labels, SCALE), expected)
    fitting = multi_label_loss(prompts, prompts, labels, SCALE)
    assert fitting < multi_label_loss(prompts.mean(1), prompts, labels, SCALE)


def test_soft_maximum_is_near_the_maximum():
    similarity = features(6, 8, 3).tanh()
    soft, largest = soft_maximum(similarity), similarity.amax(1)
    assert (soft <= largest).all()
    assert (soft >= largest - math.log(8) / GROUP_SHARPNESS - 1e-6).all()
    assert torch.equal(soft_maximum(similarity[:, :1]), similarity[:, 0])


def test_temperature_is_clamped_at_100_and_gets_no_gradient_there():
    low, high = torch.tensor(2.0, requires_grad=True), torch.tensor(9.0, requires_grad=True)
    assert similarity_scale(high) == 100.0
    similarity_scale(low).backward()
    similarity_scale(high).backward()
    assert low.grad == pytest.approx(math.exp(2.0))
    assert high.grad == 0


def test_losses_are_float32_under_autocast():
    image, text = features(4, 5), features(4, 3, 5, seed=1)
    labels = torch.arange(12).view(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        under = contrastive_loss(image, text[:, 0], SCALE), multi_label_loss(image, text, labels, SCALE)
    outside = contrastive_loss(image, text[:, 0], SCALE), multi_label_loss(image, text, labels, SCALE)
    assert under == outside
    assert under[0].dtype == torch.float32


def test_bfloat16_features_are_widened_before_the_product():
    image, text = features(4, 5).bfloat16(), features(4, 5, seed=1).bfloat16()
    torch.testing.assert_close(
        contrastive_loss(image, text, SCALE), contrastive_loss(image.float(), text.float(), SCALE)
    )


def test_labels_of_several_processes_compare_texts_not_rows(monkeypatch):
    monkeypatch.setattr("groupvit_fast.training.losses.world_size", lambda: 2)
    here = torch.tensor([[5, 6, 0], [5, 7, 0], [6, 5, 0]])
    there = torch.tensor([[6, 5], [5, 6]])  # other rows, other padding
    ours = text_labels(here, torch.tensor([[0, 1, 2]]))[0].tolist()
    theirs = text_labels(there, torch.tensor([[0, 1]]))[0].tolist()
    assert len(set(ours)) == 3
    assert ours[0] == theirs[1]
    assert ours[2] == theirs[0]


def double(*shape: int, seed: int = 0) -> torch.Tensor:
    return features(*shape, seed=seed).double().requires_grad_()


@pytest.mark.parametrize("groups", [0, 3])
def test_in_pieces_and_whole_are_the_same_to_the_last_gradient(monkeypatch, groups):
    shape = (9, groups, 5) if groups else (9, 5)
    image, prompts, scale = double(*shape), double(9, 3, 5, seed=1), SCALE.double().requires_grad_()
    bias = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(14, (9, 3), generator=torch.Generator().manual_seed(2))
    found = []
    for size in (2**24, 7 * 9 * max(groups, 1), 1):
        monkeypatch.setattr("groupvit_fast.training.losses.SIMILARITIES_AT_ONCE", size)
        loss = multi_label_loss(image, prompts, labels, scale)
        loss = loss + sigmoid_loss(image, prompts, labels, scale, bias)
        found.append([loss, *torch.autograd.grad(loss, (image, prompts, scale, bias))])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found[2], found[0], rtol=1e-12, atol=1e-13)


def test_pieces_keep_no_similarities_for_the_backward_pass(monkeypatch):
    image, text = double(64, 4), double(64, 4, seed=1)
    sizes = []
    for at_once in (2**24, 16 * 64):
        monkeypatch.setattr("groupvit_fast.training.losses.SIMILARITIES_AT_ONCE", at_once)
        kept = {}

        def pack(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = contrastive_loss(image, text, SCALE)
        sizes.append(sum(kept.values()))
        del loss
    assert sizes[0] > 64 * 64 * 8
    assert sizes[1] < 64 * 64 * 8


@pytest.mark.parametrize(("labels", "images"), [(None, 7), (9, 7), (3, 8)])
def test_double_precision_agrees_with_the_plain_formulas(labels, images):
    image, prompts, scale = double(images, 5), double(images, 2, 5, seed=1), SCALE.double()
    numbers = torch.arange(2 * images).view(images, 2)
    if labels:
        numbers = torch.randint(labels, (images, 2), generator=torch.Generator().manual_seed(2))
        prompts = double(labels, 5, seed=1)[numbers]
    found = multi_label_loss(image, prompts, numbers, scale)
    wanted = plain_multi_label(image, prompts, numbers, scale.exp(), dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert found.dtype == torch.float64
    gradient = [torch.autograd.grad(loss, image, retain_graph=True)[0] for loss in (found, wanted)]
    torch.testing.assert_close(gradient[0], gradient[1], rtol=1e-10, atol=1e-12)


def test_sigmoid_loss_is_the_published_one():
    """-1/B sum over all pairs of log sigmoid(z (t x.y + b)), z = 1 on the diagonal."""
    image, text, bias = double(6, 5), double(6, 5, seed=1), torch.tensor(-3.0).double()
    scale = SCALE.double()
    logits = scale.exp() * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T + bias
    sign = 2 * torch.eye(6).double() - 1
    wanted = -F.logsigmoid(sign * logits).sum() / 6
    found = sigmoid_loss(image, text[:, None], torch.arange(6)[:, None], scale, bias)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_sigmoid_loss_counts_a_text_once_and_knows_it_by_another_row():
    image, scale, bias = double(3, 5), SCALE.double(), torch.tensor(-3.0).double()
    table, labels = double(3, 5, seed=1), torch.tensor([[0, 1], [1, 1], [2, 0]])
    owns = torch.tensor([[1, 1, 0], [0, 1, 0], [1, 0, 1]]).double()
    logits = scale.exp() * F.normalize(image, dim=1) @ F.normalize(table, dim=1).T + bias
    wanted = -F.logsigmoid((2 * owns - 1) * logits).sum() / 3
    found = sigmoid_loss(image, table[labels], labels, scale, bias)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
