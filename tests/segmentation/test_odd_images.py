"""Images and class lists of every kind: a result or one clear line, and the evaluation goes on."""

import numpy as np
import pytest
import torch
from PIL import Image

from groupvit_fast.console import UserError
from groupvit_fast.segmentation import VocFolder, evaluate, protocol, segment_image
from groupvit_fast.segmentation.evaluation import encode_protocol_classes, resolve_protocol

SIZE = (40, 52)


def grey(image):
    return image.convert("L"), {}


def palette(image):
    return image.convert("P", palette=Image.Palette.ADAPTIVE), {"format": "PNG"}


def cmyk(image):
    return image.convert("CMYK"), {"format": "JPEG", "quality": 95}


def rgba(image):
    image.putalpha(200)
    return image, {"format": "PNG"}


def sixteen_bits(image):
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), {"format": "PNG"}


def turned(image):
    """Stored on its side, as a phone does; the mask is upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return image.transpose(Image.Transpose.ROTATE_90), {"format": "JPEG", "quality": 95, "exif": exif}


KINDS = [grey, palette, cmyk, rgba, sixteen_bits, turned]


@pytest.fixture
def odd(tmp_path, tools):
    """A dataset with one photo of each kind; the names stay .jpg, as people's files do."""
    dataset = VocFolder(tools.make_voc(tmp_path / "voc", sizes=[SIZE] * (len(KINDS) + 1)))
    for item, kind in zip(dataset.items, KINDS, strict=False):
        image, options = kind(Image.open(item.image))
        image.save(item.image, **{"format": "JPEG", **options})
    return dataset


def test_every_kind_of_image_is_scored_as_pillow_shows_it(odd, fake_model, tools):
    chosen = tools.replace(protocol("official"), short_side=32, crop=32, stride=16)
    result = evaluate(fake_model, odd, chosen, batch_size=3)
    assert result.images == len(odd)
    assert not result.left_out
    resolved = resolve_protocol(fake_model, odd, chosen)
    text = encode_protocol_classes(fake_model, odd.foreground, resolved)
    expected = np.zeros((4, 4), int)
    for item in odd.items:
        pixels, target = odd.read(item)
        assert tuple(pixels.shape) == (*SIZE, 3)
        labels = segment_image(fake_model, pixels, text, resolved)
        for true, found in zip(target.flatten().tolist(), labels.flatten().tolist(), strict=True):
            if true != 255:
                expected[true, found] += 1
    difference = np.abs(np.array(result.confusion) - expected).sum() // 2
    assert difference <= 1e-4 * expected.sum()
    upright = odd.read(odd.items[KINDS.index(turned)])[0].float()
    plain = odd.read(odd.items[-1])[0].float()
    assert upright.shape == plain.shape


def test_each_fault_is_named_and_the_rest_goes_on(tmp_path, tools, fake_model):
    dataset = VocFolder(tools.make_voc(tmp_path / "voc", sizes=[SIZE] * 9 + [(1, 4000)]))
    items = dataset.items
    items[1].mask.unlink()
    items[2].image.write_bytes(items[2].image.read_bytes()[:300])
    Image.new("L", (52, 41)).save(items[3].mask)
    Image.new("L", (52, 40), 77).save(items[4].mask)
    Image.new("RGB", (52, 40)).save(items[5].mask)
    items[6].image.unlink()
    items[7].mask.write_bytes(b"GIF")
    chosen = tools.replace(protocol("official"), short_side=32, crop=32, stride=16, long_side=64)
    result = evaluate(fake_model, dataset, chosen, batch_size=4)
    reasons = {int(item["key"][-3:]): item["reason"] for item in result.left_out}
    messages = {
        1: "the image has no mask there",
        2: "cannot be read as an image",
        3: "mask is 52 x 41 pixels but its image is 52 x 40",
        4: "mask value 77 is out of range for 4 classes",
        5: "mask has mode RGB",
        6: "no such image file",
        7: "not a readable mask",
        9: "less than one patch",
    }
    assert reasons.keys() == messages.keys()
    for number, message in messages.items():
        assert message in reasons[number]
        assert "\n" not in reasons[number]
    assert result.images == 2
    assert "2 images, 8 left out" in result.table()


def test_ten_thousand_classes(tmp_path, tools):
    names = [f"thing {number}" for number in range(10_000)]
    dataset = VocFolder(tools.make_voc(tmp_path / "voc", sizes=[SIZE] * 2, names=["a", "b"]))
    (tmp_path / "voc/classes.txt").write_text("\n".join(names))
    rng = np.random.default_rng(0)
    values = [rng.integers(0, 10_000, SIZE).astype(np.uint16) for _ in dataset.items]
    values[0][0, 0] = 65535
    for item, mask in zip(dataset.items, values, strict=True):
        Image.fromarray(mask).save(item.mask)
    dataset = VocFolder(tmp_path / "voc")
    chosen = tools.replace(protocol("official"), short_side=32, crop=32, stride=16)
    model = tools.FakeModel().eval()
    result = evaluate(model, dataset, chosen, details=True)
    text = encode_protocol_classes(model, dataset.foreground, resolve_protocol(model, dataset, chosen))
    right = 0
    for item, mask in zip(dataset.items, values, strict=True):
        labels = segment_image(model, dataset.read(item)[0], text, resolve_protocol(model, dataset, chosen))
        right += (labels.numpy() == mask).sum()
    assert len(result.per_class) == 10_000
    assert result.confusion == ()
    assert result.pixel_accuracy == pytest.approx(right / (2 * SIZE[0] * SIZE[1] - 1), abs=1e-3)
    assert sum(row.share for row in result.per_class) == pytest.approx(1)


@pytest.mark.parametrize(
    "content", ["", "# only a remark\n", "dog\nDog\n", "dog\n\ncat\n", "dog\nsofa|dog\n"]
)
def test_class_lists_that_cannot_be(voc, content):
    (voc / "classes.txt").write_text(content)
    with pytest.raises(UserError, match=r"empty|twice|blank") as error:
        VocFolder(voc)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "size", [(1, 1), (1500, 2000), pytest.param((6000, 8000), marks=pytest.mark.slow)], ids=str
)
def test_smallest_and_largest(tmp_path, tools, size):
    dataset = VocFolder(tools.make_voc(tmp_path / "voc", sizes=[SIZE, size]))
    model = tools.FakeModel().eval()
    chosen = tools.replace(protocol("official"), short_side=32, crop=32, stride=16)
    result = evaluate(model, dataset, chosen, details=True)
    assert result.images == 2
    counted = sum(height * (width - 1) for height, width in (SIZE, size))
    assert np.sum(result.confusion) == counted
    assert torch.isfinite(torch.tensor(result.miou))


def test_an_image_beyond_all_measure_is_left_out(voc, fake_model):
    dataset = VocFolder(voc)
    Image.new("L", (9000, 9000)).save(dataset.items[1].image, format="PNG")
    result = evaluate(fake_model, dataset, protocol("shapes"))
    assert result.images == 4
    assert "pixels" in result.left_out[0]["reason"]
