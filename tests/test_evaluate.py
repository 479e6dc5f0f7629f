"""The evaluate command: results in three forms, and one line for every fault."""

import csv
import json
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
from PIL import Image

from groupvit_fast.console import run_command
from groupvit_fast.evaluate import main
from groupvit_fast.model import create_model
from groupvit_fast.segmentation import Protocol

NAMES = ["grass", "sand", "ball", "box"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    create_model("tiny", seed=0).save_pretrained(folder)
    return folder


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    root = tmp_path / "voc"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for key in "abcd":
        photo = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((64, 64))
        photo.save(root / f"JPEGImages/{key}.jpg")
        mask = rng.integers(0, 4, (4, 4)).astype(np.uint8)
        Image.fromarray(mask).resize((64, 64), Image.Resampling.NEAREST).save(
            root / f"SegmentationClass/{key}.png"
        )
    (root / "ImageSets/Segmentation/val.txt").write_text("a\nb\nc\nd\n")
    (root / "classes.txt").write_text("\n".join(NAMES))
    return root


def run(*words) -> int:
    return run_command(main, [str(word) for word in words])


def test_table_json_and_folder(checkpoint, root, tmp_path, capsys):
    output, file = tmp_path / "new" / "result", tmp_path / "result.json"
    assert run(checkpoint, "--root", root, "--json", file, "--output", output, "--device", "cpu") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    values = json.loads(file.read_text())
    assert f"mIoU{values['miou']:>20.3f}" in captured.out
    assert all(name in captured.out for name in NAMES)
    assert values["images"] == 4
    assert values["settings"]["batch_size"] == 64
    assert set(values["protocol"]) == {field.name for field in fields(Protocol)}
    assert values["protocol"]["short_side"] == 96
    assert values["checkpoint"] == str(checkpoint)
    assert json.loads((output / "result.json").read_text()) == values
    with (output / "classes.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert [row["name"] for row in rows] == NAMES
    assert [float(row["iou"]) for row in rows] == [row["iou"] for row in values["per_class"]]
    with Image.open(output / "examples.png") as picture:
        assert picture.width > 1600
    assert sorted(path.name for path in output.iterdir()) == ["classes.csv", "examples.png", "result.json"]


def test_knobs_limit_and_comparison(checkpoint, root, tmp_path, capsys):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    assert run(checkpoint, "--root", root, "--json", first) == 0
    words = ["--templates", "noun", "--top-k", 2, "--limit", 3, "--batch-size", 2, "--compare", first]
    assert run(checkpoint, "--root", root, "--json", second, *words) == 0
    values = json.loads(second.read_text())
    assert values["protocol"]["templates"] == ["{}"]
    assert values["protocol"]["top_k"] == 2
    assert (values["images"], values["settings"]["limit"]) == (3, 3)
    out = capsys.readouterr().out
    assert "before" in out
    assert f"before{json.loads(first.read_text())['miou']:>16.3f}" in out


def test_pictures_of_every_image(checkpoint, root, tmp_path, capsys):
    (root / "JPEGImages/b.jpg").write_bytes(b"no")
    words = [checkpoint, "--root", root, "--output", tmp_path / "out", "--device", "cpu", "--limit", 3]
    assert run(*words, "--modes", "mask, final_group") == 0
    folder = tmp_path / "out/pictures"
    assert {path.name for path in folder.iterdir()} == {
        f"{key}_{mode}.png" for key in "ac" for mode in ("mask", "final_group")
    }
    assert f"written: mask, final_group of 2 images in {folder}" in capsys.readouterr().out
    confusion = np.array(json.loads((tmp_path / "out/result.json").read_text())["confusion"])
    labels = [np.asarray(Image.open(folder / f"{key}_mask.png")) for key in "ac"]
    assert np.bincount(np.ravel(labels), minlength=4).tolist() == confusion.sum(axis=0).tolist()


def test_background(checkpoint, root, capsys):
    (root / "classes.txt").write_text("\n".join(["background", *NAMES]))
    assert run(checkpoint, "--root", root) == 1
    assert "give one with --background-threshold" in one_line(capsys)
    assert run(checkpoint, "--root", root, "--background-threshold", 0.1) == 0
    assert "background" in capsys.readouterr().out


def test_left_out_images_are_named(checkpoint, root, tmp_path, capsys):
    (root / "SegmentationClass/b.png").unlink()
    assert run(checkpoint, "--root", root, "--json", tmp_path / "x.json") == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        f"left out b: {root}/SegmentationClass/b.png: the image has no mask there"
    ]
    assert "3 images, 1 left out" in captured.out
    assert json.loads((tmp_path / "x.json").read_text())["left_out"][0]["key"] == "b"
    assert run(checkpoint, "--root", root, "--strict") == 1
    assert "has no mask" in one_line(capsys)


def test_explain(capsys):
    assert run("--explain") == 0
    out = capsys.readouterr().out
    assert "448 px every 224 px" in out
    assert run("--explain", "--protocol", "shapes", "--top-k", 3) == 0
    out = capsys.readouterr().out
    assert "the 3 best classes" in out
    assert "shapes (changed)" in out
    assert run("--explain", "--protocol", "sclip", "--dataset", "cityscapes") == 0
    assert "short side 560 px" in capsys.readouterr().out
    assert run("--explain", "--protocol", "official", "--dataset", "context60") == 0
    assert "min(0.35, the window's best score)" in capsys.readouterr().out
    assert run("--explain", "--dataset", "voc20", "--background-threshold", 0.5) == 1
    assert "has no background class" in one_line(capsys)


def test_a_result_is_shown_again_beside_another(checkpoint, root, tmp_path, capsys):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    assert run(checkpoint, "--root", root, "--json", first) == 0
    assert run(checkpoint, "--root", root, "--json", second, "--top-k", 2, "--limit", 3, "--details") == 0
    capsys.readouterr()
    assert run(second, "--compare", first) == 0
    out = capsys.readouterr().out
    assert "not the same measurement: top_k was 5, is 2\n" in out
    assert "not the same measurement: images was 4, is 3\n" in out
    assert "near contours" in out
    assert "short_side" not in out
    assert run(first, "--compare", first) == 0
    assert "not the same" not in capsys.readouterr().out


def test_class_file_and_precision(checkpoint, root, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("lawn|grass\nbeach\nball\nbox|crate\n")
    words = ["--class-file", tmp_path / "names.txt", "--precision", "bf16", "--json", tmp_path / "x.json"]
    assert run(checkpoint, "--root", root, *words) == 0
    values = json.loads((tmp_path / "x.json").read_text())
    assert [row["name"] for row in values["per_class"]] == ["lawn", "beach", "ball", "box"]
    assert values["settings"]["precision"] == "bf16"
    (tmp_path / "names.txt").write_text("")
    assert run(checkpoint, "--root", root, *words) == 1
    assert "class list is empty" in capsys.readouterr().err


def test_lists_of_words_of_ones_own_under_sclip(checkpoint, root, tmp_path):
    """The published lists as files: a class a line with its synonyms, and the words of background."""
    (tmp_path / "names.txt").write_text("background\nbeach|sand\nball\nbox|crate|case\n")
    (tmp_path / "stuff.txt").write_text("grass\nlawn\n")
    words = ["--class-file", tmp_path / "names.txt", "--background-names", tmp_path / "stuff.txt"]
    words += ["--background-threshold", "0.1", "--area-threshold", "0.05", "--json", tmp_path / "x.json"]
    assert run(checkpoint, "--root", root, "--protocol", "sclip", *words) == 0
    values = json.loads((tmp_path / "x.json").read_text())
    assert [row["name"] for row in values["per_class"]] == ["background", "beach", "ball", "box"]
    assert values["class_names"] == ["background", "beach|sand", "ball", "box|crate|case"]
    assert values["protocol"]["background_names"] == ["grass", "lawn"]
    assert values["protocol"]["area_threshold"] == 0.05


def test_a_comparison_names_what_was_measured_differently(checkpoint, root, tmp_path, capsys):
    def measured(name, *words):
        assert run(checkpoint, "--root", root, "--json", tmp_path / name, *words) == 0
        return tmp_path / name

    def differences(old):
        capsys.readouterr()
        assert run(first, "--compare", old) == 0
        found = [line for line in capsys.readouterr().out.splitlines() if "not the same" in line]
        return [line.removeprefix("not the same measurement: ") for line in found]

    first = measured("first.json")
    assert not differences(measured("again.json"))
    (tmp_path / "names.txt").write_text("\n".join(["grass|lawn", *NAMES[1:]]))
    assert differences(measured("words.json", "--class-file", tmp_path / "names.txt")) == [
        "class_names was grass|lawn, sand, ball, box, is grass, sand, ball, box"
    ]
    assert differences(measured("half.json", "--precision", "bf16")) == ["precision was bf16, is fp32"]
    (root / "ImageSets/Segmentation/train.txt").write_text("a\nb\nc\nd\n")
    assert differences(measured("train.json", "--split", "train")) == ["split was train, is val"]
    mask = np.zeros((64, 64), np.uint8)
    Image.fromarray(mask).save(root / "SegmentationClass/a.png")
    found = differences(measured("other.json"))
    assert found[0].startswith("share of grass in the labels was ")
    values = json.loads(first.read_text())
    del values["class_names"], values["settings"]["split"]
    (tmp_path / "old.json").write_text(json.dumps(values))
    assert not differences(tmp_path / "old.json")  # a result of before these were written


def one_line(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{weights}"], "--root is missing"),
        (["--root", "{root}"], "no checkpoint given"),
        (["{root}/none", "--root", "{root}"], "{root}/none"),
        (["{root}", "--root", "{root}"], "{root}"),
        (["{weights}", "--root", "{root}/none"], "check --root"),
        (["{weights}", "--root", "{root}", "--dataset", "voc"], "unknown dataset 'voc'"),
        (["{weights}", "--root", "{root}", "--protocol", "oficial"], "did you mean official"),
        (["{weights}", "--root", "{root}", "--templates", "a photo"], "with {} for the class name"),
        (["{weights}", "--root", "{root}", "--stride", "500"], "stride is 500"),
        (["{weights}", "--root", "{root}", "--limit", "0"], "--limit is 0"),
        (["{weights}", "--root", "{root}", "--background-threshold", "0.5"], "has no background class"),
        (["{weights}", "--root", "{root}", "--compare", "{root}/none.json"], "no such result"),
        (["{weights}", "--root", "{root}", "--compare", "{root}/classes.txt"], "not a JSON result"),
        (["{weights}", "--root", "{root}", "--json", "{root}"], "is a folder"),
        (["{weights}", "--root", "{root}", "--output", "{root}/classes.txt"], "is not a folder"),
        (["{weights}", "--root", "{root}", "--modes", "pred"], "give --output"),
        (["{weights}", "--root", "{root}", "--output", "{root}/o", "--modes", "prod"], "did you mean pred"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(checkpoint, root, tmp_path, capsys, words, message):
    places = {"weights": checkpoint, "root": root}
    words = [word.replace("{weights}", str(checkpoint)).replace("{root}", str(root)) for word in words]
    before = sorted(tmp_path.rglob("*"))
    extra = [] if "--json" in words else ["--json", tmp_path / "result.json"]
    assert run(*words, *extra) == 1
    assert message.replace("{root}", str(places["root"])) in one_line(capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_as_a_program(checkpoint, root):
    words = [sys.executable, "-m", "groupvit_fast.evaluate"]
    result = subprocess.run(
        [*words, checkpoint, "--root", root / "none"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        f"error: dataset voc-folder: {root}/none is not a folder; check --root"
    ]
