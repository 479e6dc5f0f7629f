"""Converters on small files in the exact layout of the originals."""

import numpy as np
import pytest
from PIL import Image

from groupvit_fast.console import run_command
from groupvit_fast.segmentation import open_dataset
from groupvit_fast.segmentation.prepare import (
    cityscapes_labels,
    coco_object_labels,
    coco_stuff_labels,
    main,
)

# (value in the pixel map, object label, stuff label, name) from the category lists of COCO and COCO-Stuff;
# the value is the number of the category less one.
COCO_VALUES = [
    (0, 1, 0, "person"),
    (10, 11, 10, "fire hydrant"),
    (12, 12, 11, "stop sign"),
    (16, 16, 15, "cat"),
    (26, 25, 24, "backpack"),
    (62, 58, 57, "couch"),
    (89, 80, 79, "toothbrush"),
    (91, 0, 80, "banner"),
    (181, 0, 170, "wood"),
    (255, 0, 255, None),
]


def run(*words) -> int:
    return run_command(main, [str(word) for word in words])


@pytest.fixture
def coco(tmp_path):
    for folder in ("images/val2017", "annotations/val2017"):
        (tmp_path / folder).mkdir(parents=True)
    values = np.array([[value for value, *_ in COCO_VALUES]], np.uint8)
    Image.fromarray(values).save(tmp_path / "annotations/val2017/000000000139.png")
    Image.new("RGB", values.shape[::-1]).save(tmp_path / "images/val2017/000000000139.jpg")
    return tmp_path


def test_coco(coco, capsys):
    assert run("coco_object", coco) == 0
    assert run("coco_stuff", coco) == 0
    assert "1 label images written, 0 were there" in capsys.readouterr().out
    for name, column in (("coco_object", 1), ("coco_stuff", 2)):
        dataset = open_dataset(name, coco)
        _, target = dataset.read(dataset.items[0])
        assert target[0].tolist() == [row[column] for row in COCO_VALUES]
        for row in COCO_VALUES:
            if row[column] != 255 and (name == "coco_stuff" or row[column]):
                assert dataset.class_names[row[column]] == row[3]
    assert run("coco_object", coco) == 0
    assert "0 label images written, 1 were there" in capsys.readouterr().out


def test_every_label_occurs_once():
    objects, stuff, cities = coco_object_labels(), coco_stuff_labels(), cityscapes_labels()
    assert sorted(objects[(objects > 0) & (objects < 254)]) == list(range(1, 81))
    assert sorted(stuff[stuff < 254]) == list(range(171))
    assert sorted(cities[cities < 254]) == list(range(19))


def test_cityscapes(tmp_path):
    name = "lindau/lindau_000000_000019"
    for folder in ("leftImg8bit/val/lindau", "gtFine/val/lindau"):
        (tmp_path / folder).mkdir(parents=True)
    values = np.array([[0, 7, 11, 26, 29, 33, 255]], np.uint8)
    Image.fromarray(values).save(tmp_path / f"gtFine/val/{name}_gtFine_labelIds.png")
    Image.new("RGB", (7, 1)).save(tmp_path / f"leftImg8bit/val/{name}_leftImg8bit.png")
    assert run("cityscapes", tmp_path) == 0
    dataset = open_dataset("cityscapes", tmp_path)
    _, target = dataset.read(dataset.items[0])
    assert target[0].tolist() == [255, 0, 2, 13, 255, 18, 255]
    assert [dataset.class_names[label] for label in (0, 2, 13, 18)] == ["road", "building", "car", "bicycle"]


@pytest.mark.parametrize("fault", ["value", "colour", "damaged", "empty", "missing"])
def test_faults_are_one_line(coco, capsys, fault):
    source = coco / "annotations/val2017/000000000139.png"
    message = "is not a readable mask"
    if fault == "value":
        Image.fromarray(np.array([[0, 11]], np.uint8)).save(source)
        message = "value 11 is not one of this format"
    elif fault == "colour":
        Image.new("RGB", (4, 4)).save(source)
        message = "mask has mode RGB"
    elif fault == "damaged":
        source.write_bytes(source.read_bytes()[:40])
        message = "not a readable mask"
    elif fault == "empty":
        source.unlink()
        message = "unpack stuffthingmaps_trainval2017.zip"
    else:
        source.parent.rename(coco / "elsewhere")
        message = "is not a folder; unpack"
    before = sorted(coco.rglob("*"))
    assert run("coco_object", coco) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert sorted(coco.rglob("*")) == before


@pytest.fixture
def context(tmp_path):
    """Pascal Context beside VOC2010, as distributed: three images, one of them only in VOC."""
    io = pytest.importorskip("scipy.io")
    for folder in ("trainval", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    for key, values in (("2008_000002", [[2, 9, 458], [0, 187, 459]]), ("2008_000003", [[427, 260, 1]])):
        io.savemat(
            tmp_path / f"trainval/{key}.mat", {"LabelMap": np.array(values, np.uint16)}, do_compression=True
        )
        Image.new("RGB", (3, len(values))).save(tmp_path / f"JPEGImages/{key}.jpg")
    (tmp_path / "ImageSets/Main/train.txt").write_text("2008_000003\n")
    (tmp_path / "ImageSets/Main/val.txt").write_text("2008_000002\n2008_000007\n")
    return tmp_path


def test_context(context, capsys):
    assert run("context60", context) == 0
    assert "2 label images written, 0 were there" in capsys.readouterr().out
    dataset = open_dataset("context60", context)
    assert len(dataset) == 1
    target = dataset.read(dataset.items[0])[1]
    assert target.tolist() == [[1, 2, 59], [0, 29, 0]]
    assert [dataset.class_names[label] for label in (1, 2, 59, 29)] == ["airplane", "bag", "wood", "grass"]
    train = open_dataset("context59", context, "train")
    labels = train.read(train.items[0])[1][0].tolist()
    assert labels[2] == 255
    assert [train.class_names[label] for label in labels[:2]] == ["tvmonitor", "mouse"]
    assert run("context60", context) == 0
    assert "0 label images written, 2 were there" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["value", "damaged", "empty", "lists", "scipy"])
def test_faults_of_context_are_one_line(context, capsys, monkeypatch, fault):
    source = context / "trainval/2008_000002.mat"
    if fault == "value":
        from scipy.io import savemat

        savemat(source, {"LabelMap": np.array([[460]], np.uint16)})
        message = "other numbers than 0 to 459"
    elif fault == "damaged":
        source.write_bytes(source.read_bytes()[:150])
        message = "not an annotation of Pascal Context"
    elif fault == "empty":
        source.parent.rename(context / "elsewhere")
        message = "unpack trainval.tar.gz"
    elif fault == "lists":
        (context / "ImageSets/Main/val.txt").unlink()
        message = "must be VOC2010"
    else:
        monkeypatch.setitem(__import__("sys").modules, "scipy.io", None)
        message = "pip install scipy"
    assert run("context60", context) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
