"""Folder layouts, label rules, and what is said about faulty data."""

import numpy as np
import pytest
from PIL import Image

from groupvit_fast.console import UserError
from groupvit_fast.segmentation import VocFolder, open_dataset
from groupvit_fast.segmentation.datasets import (
    BENCHMARKS,
    CLASS_LISTS,
    FolderPair,
    benchmark_classes,
    read_mask,
)

SIZES = {"voc21": 21, "voc20": 20, "context60": 60, "context59": 59, "coco_object": 81, "coco_stuff": 171,
         "cityscapes": 19, "ade20k": 150}  # fmt: skip


def write_pair(root, image: str, mask: str, values: list[list[int]]) -> None:
    for path, picture in (
        (root / image, Image.new("RGB", (len(values[0]), len(values)), "green")),
        (root / mask, Image.fromarray(np.array(values, np.uint8))),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_class_lists(name):
    names = benchmark_classes(name)
    assert len(names) == SIZES[name]
    assert (names[0] == "background") == (name in ("voc21", "context60", "coco_object"))
    assert "background" not in names[1:]
    assert "Source:" in (CLASS_LISTS / f"{name}.txt").read_text()


def test_known_labels():
    """A few labels that the annotation files fix, so that a shifted list cannot pass."""
    voc, context, coco = map(benchmark_classes, ("voc21", "context60", "coco_object"))
    assert (voc[15], voc[20], voc[11]) == ("person", "monitor", "table")
    assert (context[1], context[29], context[59], context[55]) == ("airplane", "grass", "wood", "monitor")
    assert (coco[1], coco[17], coco[80]) == ("person", "dog", "toothbrush")
    assert benchmark_classes("cityscapes")[13] == "car"
    assert benchmark_classes("ade20k")[12] == "person"
    assert benchmark_classes("coco_stuff")[80] == "banner"


LAYOUTS = {
    "voc21": ("JPEGImages/2007_000033.jpg", "SegmentationClass/2007_000033.png"),
    "voc20": ("JPEGImages/2007_000033.jpg", "SegmentationClass/2007_000033.png"),
    "context60": ("JPEGImages/2008_000002.jpg", "SegmentationClassContext/2008_000002.png"),
    "context59": ("JPEGImages/2008_000002.jpg", "SegmentationClassContext/2008_000002.png"),
    "coco_object": (
        "images/val2017/000000000139.jpg",
        "annotations/val2017/000000000139_instanceTrainIds.png",
    ),
    "coco_stuff": ("images/val2017/000000000139.jpg", "annotations/val2017/000000000139_labelTrainIds.png"),
    "cityscapes": (
        "leftImg8bit/val/lindau/lindau_000000_000019_leftImg8bit.png",
        "gtFine/val/lindau/lindau_000000_000019_gtFine_labelTrainIds.png",
    ),
    "ade20k": ("images/validation/ADE_val_00000001.jpg", "annotations/validation/ADE_val_00000001.png"),
}
SPLITS = {"voc": "ImageSets/Segmentation/val.txt", "con": "ImageSets/SegmentationContext/val.txt"}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_layouts(tmp_path, name):
    image, mask = LAYOUTS[name]
    shifted = name in ("voc20", "context59", "ade20k")
    last = SIZES[name] - 1
    write_pair(tmp_path, image, mask, [[0, 1, 2], [last + shifted, 255, 1]])
    if name[:3] in SPLITS:
        split = tmp_path / SPLITS[name[:3]]
        split.parent.mkdir(parents=True)
        split.write_text(image.split("/")[-1].removesuffix(".jpg") + "\n")
    dataset = open_dataset(name, tmp_path)
    assert len(dataset) == 1
    assert dataset.background == (name in ("voc21", "context60", "coco_object"))
    assert len(dataset.foreground) == SIZES[name] - dataset.background
    pixels, target = dataset.read(dataset.items[0])
    assert pixels.shape == (2, 3, 3)
    expected = [[255, 0, 1], [last, 255, 0]] if shifted else [[0, 1, 2], [last, 255, 1]]
    assert target.tolist() == expected


@pytest.mark.parametrize("name", ["voc21", "voc20", "ade20k"])
def test_labels_out_of_range(tmp_path, name):
    image, mask = LAYOUTS[name]
    too_large = SIZES[name] + (name != "voc21")
    write_pair(tmp_path, image, mask, [[1, too_large]])
    if name[:3] in SPLITS:
        split = tmp_path / SPLITS[name[:3]]
        split.parent.mkdir(parents=True)
        split.write_text("2007_000033")
    dataset = open_dataset(name, tmp_path)
    with pytest.raises(UserError, match=f"value {too_large} is out of range for {SIZES[name]} classes"):
        dataset.read(dataset.items[0])


def test_palette_masks_are_read_as_indices(voc):
    dataset = VocFolder(voc)
    for item in dataset.items:
        with Image.open(item.mask) as mask:
            assert mask.mode == "P"
            assert np.asarray(mask.convert("RGB")).std() > 0
        _, target = dataset.read(item)
        assert set(target.unique().tolist()) <= {0, 1, 2, 3, 255}


def test_voc_folder(voc):
    dataset = VocFolder(voc)
    assert dataset.name == "voc-folder"
    assert dataset.class_names == dataset.foreground == ["sky", "sea", "sand", "boat"]
    assert [item.key for item in dataset.items] == [f"photo_{index:03d}" for index in range(5)]
    (voc / "classes.txt").write_text("Background\nsky\nsea\nsand|beach\n")
    dataset = VocFolder(voc)
    assert dataset.background
    assert dataset.foreground == ["sky", "sea", "sand|beach"]


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("ImageSets/Segmentation/val.txt", None, "no split file"),
        ("ImageSets/Segmentation/val.txt", "\n", "lists no image"),
        ("ImageSets/Segmentation/val.txt", "photo_001\nphoto_002\nphoto_001\n", "lists photo_001 twice"),
        ("classes.txt", None, "no such class list"),
        ("classes.txt", "", "class list is empty"),
        ("classes.txt", "background\n", "nothing but background"),
        ("classes.txt", "\n".join(f"class {k}" for k in range(65535)), "65535 classes"),
    ],
)
def test_faulty_folders(voc, path, content, message):
    (voc / path).unlink()
    if content is not None:
        (voc / path).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        VocFolder(voc)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("folder", ["JPEGImages", "SegmentationClass"])
def test_missing_folder(voc, folder):
    (voc / folder).rename(voc / "elsewhere")
    with pytest.raises(UserError, match=f"{folder} is not a folder; check --root"):
        VocFolder(voc)


def test_missing_root_and_unknown_name(tmp_path):
    with pytest.raises(UserError, match="check --root"):
        VocFolder(tmp_path / "none")
    with pytest.raises(UserError, match="did you mean context60"):
        open_dataset("contxt60", tmp_path)


def test_no_image_where_there_is_no_split(tmp_path):
    for folder in ("images/validation", "annotations/validation"):
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(UserError, match=r"no \*\.jpg in"):
        open_dataset("ade20k", tmp_path)


def test_mask_of_another_size(voc):
    dataset = VocFolder(voc)
    Image.new("L", (31, 32)).save(dataset.items[1].mask)
    with pytest.raises(UserError, match="mask is 31 x 32 pixels but its image is 32 x 32"):
        dataset.read(dataset.items[1])


def test_missing_mask_and_missing_image(voc):
    dataset = VocFolder(voc)
    dataset.items[0].mask.unlink()
    dataset.items[1].image.unlink()
    with pytest.raises(UserError, match="has no mask"):
        dataset.read(dataset.items[0])
    with pytest.raises(UserError, match="no such image file"):
        dataset.read(dataset.items[1])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "1", "F"])
def test_masks_that_are_not_labels(tmp_path, mode):
    path = tmp_path / ("mask.tif" if mode == "F" else "mask.png")
    Image.new(mode, (4, 4)).save(path)
    with pytest.raises(UserError, match=f"mask has mode {mode}"):
        read_mask(path)


def test_sixteen_bit_masks(voc):
    dataset = VocFolder(voc)
    values = np.full((32, 32), 2, np.uint16)
    Image.fromarray(values).save(dataset.items[0].mask)
    assert dataset.read(dataset.items[0])[1].unique().tolist() == [2]
    values[3, 3] = 511  # 255 in its lower byte
    Image.fromarray(values).save(dataset.items[0].mask)
    with pytest.raises(UserError, match="mask value 511 is out of range"):
        dataset.read(dataset.items[0])


@pytest.mark.parametrize("content", [b"", b"not a picture", None])
def test_damaged_mask(voc, content):
    dataset = VocFolder(voc)
    path = dataset.items[0].mask
    path.write_bytes(path.read_bytes()[:60] if content is None else content)
    with pytest.raises(UserError, match="not a readable mask") as error:
        dataset.read(dataset.items[0])
    assert "\n" not in str(error.value)


def test_more_than_254_classes_need_16_bits(voc):
    (voc / "classes.txt").write_text("\n".join(f"class {k}" for k in range(1000)))
    dataset = VocFolder(voc)
    values = np.full((32, 32), 999, np.uint16)
    values[0, :2] = 255, 65535
    Image.fromarray(values).save(dataset.items[0].mask)
    target = dataset.read(dataset.items[0])[1]
    assert target[0, :3].tolist() == [255, 65535, 999]
    values[3, 3] = 1000
    Image.fromarray(values).save(dataset.items[0].mask)
    with pytest.raises(UserError, match="mask value 1000 is out of range"):
        dataset.read(dataset.items[0])


@pytest.mark.parametrize("background", [False, True])
def test_imagenet_s(tmp_path, background):
    """Class numbers as red + 256 x green; 1000 does not count; 0 is everything else."""
    for folder in ("validation/n01", "validation-segmentation/n01"):
        (tmp_path / folder).mkdir(parents=True)
    names = [f"class {k}" for k in range(1, 920)]
    (tmp_path / "classes.txt").write_text("\n".join(["background"] * background + names))
    values = np.array([[0, 1, 919, 1000, 300]])
    mask = np.stack([values % 256, values // 256, np.zeros_like(values)], axis=2).astype(np.uint8)
    Image.fromarray(mask).save(tmp_path / "validation-segmentation/n01/a.png")
    Image.new("RGB", (5, 1)).save(tmp_path / "validation/n01/a.JPEG", format="JPEG")
    dataset = open_dataset("imagenet_s", tmp_path)
    assert [item.key for item in dataset.items] == ["n01/a"]
    target = dataset.read(dataset.items[0])[1]
    labels = [0, 1, 919, 65535, 300] if background else [65535, 0, 918, 65535, 299]
    assert target.tolist() == [labels]
    assert dataset.class_names[labels[2]] == "class 919"


@pytest.mark.parametrize(
    ("base", "masks"), [("", "masks"), ("validation/", "annotations"), ("val/", "labels")]
)
def test_folder_pair(tmp_path, base, masks):
    for key, suffix in (("a", ".jpg"), ("b/c", ".png"), ("d", ".jpeg")):
        write_pair(tmp_path, f"{base}images/{key}{suffix}", f"{base}{masks}/{key}.png", [[0, 1, 255]])
    (tmp_path / "id2label.json").write_text('{"1": "sea", "0": "sky"}')
    dataset = open_dataset("folder-pair", tmp_path)
    assert dataset.class_names == ["sky", "sea"]
    assert [item.key for item in dataset.items] == ["a", "b/c", "d"]
    assert dataset.read(dataset.items[1])[1].tolist() == [[0, 1, 255]]
    (tmp_path / "classes.txt").write_text("background\nsea\n")
    assert FolderPair(tmp_path).background


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("[1, 2]", "not a table"),
        ("{", "not a table"),
        ('{"1": "a"}', "must be 0 to 0"),
        ('{"0": "a", "1": "A"}', "'A' occurs twice"),
        (None, "no such class list"),
    ],
)
def test_faulty_tables_of_names(tmp_path, table, message):
    write_pair(tmp_path, "images/a.jpg", "masks/a.png", [[0]])
    if table:
        (tmp_path / "id2label.json").write_text(table)
    with pytest.raises(UserError, match=message):
        FolderPair(tmp_path)


def test_two_images_with_one_mask(tmp_path):
    write_pair(tmp_path, "images/a.jpg", "masks/a.png", [[0]])
    write_pair(tmp_path, "images/a.png", "masks/a.png", [[0]])
    (tmp_path / "classes.txt").write_text("sky\n")
    with pytest.raises(UserError, match="would have the same mask"):
        FolderPair(tmp_path)


def test_splits_and_class_files(tmp_path):
    write_pair(tmp_path, "images/training/x.jpg", "annotations/training/x.png", [[0, 1, 150]])
    train = open_dataset("ade20k", tmp_path, "train")
    assert train.read(train.items[0])[1].tolist() == [[255, 0, 149]]
    with pytest.raises(UserError, match="images/validation is not a folder"):
        open_dataset("ade20k", tmp_path)
    names = [f"{name}|another {name}" for name in benchmark_classes("ade20k")]
    assert open_dataset("ade20k", tmp_path, "train", names).foreground[0] == "wall|another wall"
    with pytest.raises(UserError, match="has 150 classes, the class file 149"):
        open_dataset("ade20k", tmp_path, "train", names[1:])
    with pytest.raises(UserError, match="first line of the class file must be 'background'"):
        open_dataset("voc21", tmp_path, "train", names[:21])
