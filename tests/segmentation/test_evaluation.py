"""The whole evaluation against an independent count, and what it does with faulty images."""

import json

import numpy as np
import pytest
import torch

from groupvit_fast.console import UserError
from groupvit_fast.model import create_model, linear
from groupvit_fast.segmentation import VocFolder, evaluate, protocol, segment_image, tally
from groupvit_fast.segmentation.evaluation import (
    encode_protocol_classes,
    examples_picture,
    resolve_protocol,
)
from groupvit_fast.segmentation.report import Evaluation

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def recount(model, dataset, chosen):
    """IoU per class, pixel accuracy and the labelled pixels, image by image with the reference."""
    text = encode_protocol_classes(model, dataset.foreground, chosen)
    count = len(dataset.class_names)
    hits, truths, predictions = np.zeros(count), np.zeros(count), np.zeros(count)
    for item in dataset.items:
        image, target = dataset.read(item)
        labels = segment_image(model, image.to(next(model.parameters()).device), text, chosen).cpu().numpy()
        target = target.numpy()
        for k in range(count):
            hits[k] += ((labels == k) & (target == k)).sum()
            truths[k] += (target == k).sum()
            predictions[k] += ((labels == k) & (target != 255)).sum()
    with np.errstate(invalid="ignore"):
        return hits / (truths + predictions - hits), hits.sum() / truths.sum(), truths


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_scores_by_recounting(tmp_path, tools, mode, background, device):
    sizes = [(32, 32), (32, 32), (40, 61), (70, 33), (32, 32), (45, 45), (40, 61)]
    names = ["background"] * background + ["sky", "sea", "sand|beach", "boat"]
    dataset = VocFolder(tools.make_voc(tmp_path / "voc", sizes=sizes, names=names))
    model = tools.FakeModel().eval()
    chosen = tools.replace(protocol("official"), short_side=32, crop=32, stride=16, mode=mode)
    threshold = 0.2 if background else None
    result = evaluate(model, dataset, chosen, device=device, batch_size=3, background_threshold=threshold)
    resolved = resolve_protocol(model, dataset, chosen, threshold)
    ious, accuracy, truths = recount(model, dataset, resolved)
    np.testing.assert_allclose([row.iou for row in result.per_class], ious, atol=2e-4)
    assert result.miou == pytest.approx(np.nanmean(ious), abs=2e-4)
    assert result.pixel_accuracy == pytest.approx(accuracy, abs=2e-4)
    assert [row.share for row in result.per_class] == pytest.approx(truths / truths.sum())
    assert np.sum(result.confusion) == truths.sum()
    assert result.miou_largest_class == pytest.approx(truths.max() / truths.sum() / (truths > 0).sum())
    assert result.largest_class == dataset.class_names[truths.argmax()].split("|")[0]
    assert result.images == 7
    assert 1 < result.groups_in_use <= result.groups == 6
    assert result.oracle_miou > 0
    assert result.protocol == resolved.to_dict()


def test_perfect_groups_reach_an_oracle_of_one(tmp_path, tools):
    """Truth made of the model's own groups: the oracle is exact whatever the names are."""
    from PIL import Image

    from groupvit_fast.segmentation.batch import segment_batch

    dataset = VocFolder(tools.make_voc(tmp_path / "voc"))
    model = tools.FakeModel(groups=4).eval()
    chosen = resolve_protocol(model, dataset, protocol("shapes"))
    text = encode_protocol_classes(model, dataset.foreground, chosen)
    right = 0
    for item in dataset.items:
        result = segment_batch(model, [dataset.read(item)[0]], text, chosen)[0]
        Image.fromarray(result.groups.numpy().astype(np.uint8)).save(item.mask)
        sizes = torch.bincount(result.groups.flatten(), minlength=4)
        for group in range(4):
            if sizes[group] >= 0.01 * result.groups.numel():
                right += result.labels[result.groups == group][0].item() == group
    scored = evaluate(model, dataset, protocol("shapes"))
    assert scored.oracle_miou == 1.0
    assert scored.naming_accuracy == pytest.approx(right / scored.pure_groups)


def test_batch_size_and_mode_do_not_matter(voc, fake_model):
    dataset = VocFolder(voc)
    fake_model.train()
    results = [evaluate(fake_model, dataset, protocol("shapes"), batch_size=size) for size in (1, 2, 100)]
    assert results[0].confusion == results[1].confusion == results[2].confusion
    assert results[0].pure_groups == results[2].pure_groups
    assert fake_model.training


@pytest.mark.parametrize("details", [False, True])
def test_pixels_counted_in_pieces(voc, fake_model, monkeypatch, details):
    """At once, and in more pieces than images, with borders within them."""
    sizes, count = [], tally.metrics.counts_by_image
    monkeypatch.setattr(
        tally.metrics, "counts_by_image", lambda *args: sizes.append(args[0].numel()) or count(*args)
    )

    def result(pixels):
        sizes.clear()
        monkeypatch.setitem(tally.PIXELS_PER_COUNT, "cpu", pixels)
        values = evaluate(fake_model, VocFolder(voc), protocol("shapes"), details=details).to_json()
        return {key: value for key, value in values.items() if key not in ("seconds", "images_per_s")}

    whole = result(1 << 22)
    assert len(sizes) == 1
    assert result(100) == whole
    assert len(sizes) > 10


def test_limit_and_progress(voc, fake_model):
    calls = []
    result = evaluate(
        fake_model,
        VocFolder(voc),
        protocol("shapes"),
        limit=3,
        batch_size=2,
        progress=lambda *call: calls.append(call),
    )
    assert result.images == 3
    assert [call[:2] for call in calls] == [(2, 3), (3, 3)]
    assert calls[-1][2] == pytest.approx(result.miou)


def test_faulty_images_are_left_out_and_named(voc, fake_model):
    dataset = VocFolder(voc)
    good = evaluate(fake_model, dataset, protocol("shapes"), limit=2)
    dataset.items[2].mask.unlink()
    dataset.items[3].image.write_bytes(b"no picture")
    dataset.items[4].mask.write_bytes(dataset.items[4].mask.read_bytes()[:50])
    result = evaluate(fake_model, dataset, protocol("shapes"), batch_size=2)
    assert result.confusion == good.confusion
    assert [item["key"] for item in result.left_out] == ["photo_002", "photo_003", "photo_004"]
    assert "has no mask" in result.left_out[0]["reason"]
    assert "2 images, 3 left out" in result.table()
    with pytest.raises(UserError, match="has no mask"):
        evaluate(fake_model, dataset, protocol("shapes"), strict=True)


def test_nothing_left_is_an_error(voc, fake_model):
    dataset = VocFolder(voc)
    for item in dataset.items:
        item.mask.unlink()
    with pytest.raises(UserError, match=r"none of 5 images could be used; first: .*has no mask"):
        evaluate(fake_model, dataset, protocol("shapes"))


def test_an_image_too_thin_for_a_patch_is_left_out(tmp_path, tools):
    dataset = VocFolder(tools.make_voc(tmp_path / "voc", sizes=[(32, 32), (1, 3000)]))
    chosen = tools.replace(protocol("official"), short_side=32, long_side=64)
    result = evaluate(tools.FakeModel(), dataset, chosen)
    assert result.images == 1
    assert "less than one patch of 4" in result.left_out[0]["reason"]


def test_one_pixel_image(tmp_path, tools):
    dataset = VocFolder(tools.make_voc(tmp_path / "voc", sizes=[(1, 1), (2, 1), (32, 32)]))
    result = evaluate(tools.FakeModel(), dataset, protocol("shapes"))
    assert result.images == 3


@pytest.mark.parametrize("part", ["names", "words"])
def test_weights_with_nan_are_an_error(voc, fake_model, part):
    getattr(fake_model, part).data[:] = float("nan")
    with pytest.raises(UserError, match="gives NaN"):
        evaluate(fake_model, VocFolder(voc), protocol("shapes"))


def test_json_and_back(voc, fake_model):
    result = evaluate(fake_model, VocFolder(voc), protocol("shapes"))
    text = json.dumps(result.to_json(), allow_nan=False)
    again = Evaluation.from_json(json.loads(text))
    assert again.table() == result.table()
    assert json.dumps(again.to_json()) == text
    with pytest.raises(UserError, match="miou is missing"):
        Evaluation.from_json({"dataset": "x", "images": 3})


def test_picture_of_examples(voc, fake_model):
    picture = examples_picture(fake_model, VocFolder(voc), protocol("shapes"), count=4, title="four photos")
    assert picture.width > 8 * 192
    colours = np.asarray(picture).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 50


def test_bfloat16_moves_few_labels(tmp_path, tools):
    """Also where one stage's map comes out in bfloat16 and another's in float32."""
    dataset = VocFolder(tools.make_voc(tmp_path / "voc", sizes=[(40, 61), (70, 33)]))
    chosen = tools.replace(protocol("official"), short_side=32, crop=32, stride=16)
    model = tools.FakeModel().eval()
    full, half = (
        np.array(evaluate(model, dataset, chosen, precision=name).confusion) for name in ("fp32", "bf16")
    )
    assert full.sum() == half.sum()
    assert 0 < np.abs(full - half).sum() < 0.1 * full.sum()
    with pytest.raises(UserError, match="choose one of fp32, bf16"):
        evaluate(model, dataset, chosen, precision="fp8")


@pytest.mark.skipif(not linear.HAS_ONEDNN, reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_are_laid_out_once_for_all_images(voc, monkeypatch, precision):
    packed, used = [], []
    make, call = linear.PackedProduct.of, linear.PackedProduct.__call__
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(
        linear.PackedProduct, "of", lambda layer, dtype: packed.append(layer) or make(layer, dtype)
    )
    monkeypatch.setattr(
        linear.PackedProduct,
        "__call__",
        lambda self, x, *rest: used.append(self.dtype) or call(self, x, *rest),
    )
    model = create_model("tiny", seed=0)
    evaluate(model, VocFolder(voc), protocol("shapes"), batch_size=2, precision=precision)
    layers = [module for module in model.modules() if isinstance(module, linear.Linear)]
    assert packed == layers
    assert set(used) == {{"fp32": torch.float32, "bf16": torch.bfloat16}[precision]}
    assert all(layer.packed is None for layer in layers)
