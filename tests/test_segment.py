"""The segment command: pictures, masks and shares for one photo or many, and one line for every fault."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from groupvit_fast.console import run_command
from groupvit_fast.model import create_model, load_model
from groupvit_fast.segment import main
from groupvit_fast.segmentation import explore, modes, protocol, segment_image
from groupvit_fast.segmentation.modes import MODES
from groupvit_fast.segmentation.prompts import encode_classes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    create_model("tiny", seed=3).save_pretrained(folder)
    return folder


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    path = tmp_path / "photo.jpg"
    Image.fromarray(pixels).resize((140, 100)).save(path)
    return path


def run(*words) -> int:
    return run_command(main, [str(word) for word in words])


def test_one_photo(checkpoint, photo, tmp_path, capsys):
    out, file = tmp_path / "out", tmp_path / "all.json"
    assert run(checkpoint, photo, "--classes", "dog, grass, sofa|couch", "--output", out, "--json", file) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "photo.json",
        "photo_input_pred_label.png",
        "photo_mask.png",
    ]
    model = load_model(checkpoint)
    chosen = protocol("shapes").resolve(dataset="", background=False, image_size=64)
    text = encode_classes(model, ["dog", "grass", "sofa|couch"], chosen.templates)
    with Image.open(photo) as picture:
        expected = segment_image(model, torch.tensor(np.asarray(picture)), text, chosen).numpy()
    with Image.open(out / "photo_mask.png") as mask:
        assert mask.mode == "P"
        labels = np.asarray(mask)
    assert labels.shape == (100, 140)
    assert (labels != expected).mean() < 1e-4
    values = json.loads((out / "photo.json").read_text())
    assert values["labels"] == {"0": "dog", "1": "grass", "2": "sofa"}
    for label, name in enumerate(["dog", "grass", "sofa"]):
        assert values["shares"][name] == pytest.approx((labels == label).mean())
    assert values["protocol"]["name"] == "shapes"
    assert [item["image"] for item in json.loads(file.read_text())["images"]] == [str(photo)]
    assert "photo_input_pred_label.png" in capsys.readouterr().out


def test_background(checkpoint, photo, tmp_path):
    words = [checkpoint, photo, "--classes", "dog, grass", "--output"]
    assert run(*words, tmp_path / "plain", "--no-background") == 0
    assert run(*words, tmp_path / "with", "--background", "--background-threshold", 0.3) == 0
    plain, chosen = (json.loads((tmp_path / name / "photo.json").read_text()) for name in ("plain", "with"))
    assert list(plain["shares"]) == ["dog", "grass"]
    assert list(chosen["shares"]) == ["background", "dog", "grass"]
    assert chosen["protocol"]["background_threshold"] == 0.3


def test_folders_patterns_and_equal_names(checkpoint, photo, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("photo.png", "b.jpg", "notes.txt"):
        (folder / name).write_bytes(photo.read_bytes())
    out = tmp_path / "out"
    assert (
        run(checkpoint, photo, folder, f"{tmp_path}/pho*.jpg", "--classes", "dog, cat", "--output", out) == 0
    )
    names = {path.name for path in out.glob("*.json")}
    assert names == {"photo.json", "b.json", "photo-2.json"}
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert run(checkpoint, photo, "--classes", "dog, cat", "--output", out, "--quiet") == 0
    assert capsys.readouterr().out == ""


def test_class_lists_from_files_and_benchmarks(checkpoint, photo, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("# mine\nbackground\ndog\nsofa|couch\n")
    assert run(checkpoint, photo, "--classes", names, "--output", tmp_path / "file") == 0
    assert list(json.loads((tmp_path / "file/photo.json").read_text())["shares"]) == ["dog", "sofa"]
    assert run(checkpoint, photo, "--classes", "voc21", "--output", tmp_path / "voc") == 0
    assert len(json.loads((tmp_path / "voc/photo.json").read_text())["shares"]) == 20


def test_more_classes_than_a_palette_holds(checkpoint, photo, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"thing {number}" for number in range(300)))
    assert run(checkpoint, photo, "--classes", names, "--output", tmp_path / "out") == 0
    with Image.open(tmp_path / "out/photo_mask.png") as mask:
        assert np.asarray(mask).dtype == np.uint16


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "I;16", "P", "1"])
def test_any_kind_of_photo(checkpoint, photo, tmp_path, mode):
    path = tmp_path / ("other.tif" if mode == "CMYK" else "other.png")
    with Image.open(photo) as picture:
        if mode == "I;16":
            Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(path)
        else:
            picture.convert(mode).save(path)
    assert run(checkpoint, path, "--classes", "dog, cat", "--output", tmp_path / "out") == 0
    with Image.open(tmp_path / "out/other_mask.png") as mask:
        assert mask.size == (140, 100)


def test_a_rotated_photo_is_turned_upright(checkpoint, photo, tmp_path):
    with Image.open(photo) as picture:
        exif = picture.getexif()
        exif[0x0112] = 6
        picture.save(tmp_path / "turned.jpg", exif=exif)
    assert (
        run(checkpoint, tmp_path / "turned.jpg", "--classes", "dog, cat", "--output", tmp_path / "out") == 0
    )
    with Image.open(tmp_path / "out/turned_mask.png") as mask:
        assert mask.size == (100, 140)


def test_one_pixel(checkpoint, tmp_path):
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    assert run(checkpoint, tmp_path / "dot.png", "--classes", "dog", "--output", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out/dot.json").read_text())["shares"] == {"dog": 1.0}


def test_a_corrupt_photo_among_good_ones(checkpoint, photo, tmp_path, capsys):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(photo.read_bytes()[:300])
    out = tmp_path / "out"
    assert run(checkpoint, broken, photo, "--classes", "dog, cat", "--output", out) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {broken}: cannot be read")
    assert captured.err.count("\n") == 1
    assert {path.name for path in out.iterdir()} == {
        "photo.json",
        "photo_mask.png",
        "photo_input_pred_label.png",
    }


def test_every_picture(checkpoint, photo, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(checkpoint, photo, "--classes", "dog, cat", "--output", out, "--modes", "all") == 0
    assert {path.stem.removeprefix("photo_") for path in out.glob("*.png")} == set(MODES)
    result = json.loads((out / "photo.json").read_text())
    assert list(result["pictures"]) == list(MODES)
    assert all(Path(file).exists() for file in result["pictures"].values())
    assert "and 9 more" in capsys.readouterr().out


@pytest.mark.parametrize(
    "fault", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")]
)
def test_a_photo_too_large_for_the_memory(checkpoint, photo, tmp_path, capsys, monkeypatch, fault):
    other = tmp_path / "other.jpg"
    other.write_bytes(photo.read_bytes())
    faults = [fault]
    monkeypatch.setattr(
        modes, "encode_photo", lambda *words: raise_once(faults) or explore.encode_photo(*words)
    )
    assert run(checkpoint, photo, other, "--classes", "dog, cat", "--output", tmp_path / "out") == 1
    assert capsys.readouterr().err == (
        f"error: {photo}: not enough memory for 140 x 100 pixels; make the image smaller\n"
    )
    assert (tmp_path / "out/other.json").exists()


def raise_once(faults):
    if faults:
        raise faults.pop()


def test_a_page_of_photos(checkpoint, photo, tmp_path, capsys):
    other, broken, page = tmp_path / "b<i>.jpg", tmp_path / "broken.jpg", tmp_path / "new" / "page.html"
    other.write_bytes(photo.read_bytes())
    broken.write_bytes(b"no")
    words = [checkpoint, photo, broken, other, "--classes", "dog, cat", "--output", tmp_path / "out"]
    assert run(*words, "--html", page) == 1
    text = page.read_text()
    assert "<title>2 segmented photos</title>" in text
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert [item["name"] for item in data["photos"]] == ["photo.jpg", "b<i>.jpg"]
    shares = json.loads((tmp_path / "out/photo.json").read_text())["shares"]
    for item in data["photos"][0]["classes"]:
        assert item["share"] == shares[item["name"]]
    assert capsys.readouterr().err.startswith(f"error: {broken}")


def test_a_page_of_too_many_photos_is_refused_before_any_work(checkpoint, photo, tmp_path, capsys):
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(201):
        (folder / f"{number}.png").touch()
    words = [checkpoint, folder, "--classes", "dog", "--html", tmp_path / "page.html"]
    assert run(*words, "--output", tmp_path / "out") == 1
    assert "201 photos make a page too heavy" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_ten_thousand_classes(checkpoint, photo, tmp_path):
    names, out = tmp_path / "names.txt", tmp_path / "out"
    names.write_text("\n".join(f"thing {number}" for number in range(10_000)))
    assert run(checkpoint, photo, "--classes", names, "--output", out, "--html", tmp_path / "page.html") == 0
    shares = json.loads((out / "photo.json").read_text())["shares"]
    assert len(shares) == 10_000
    assert sum(shares.values()) == pytest.approx(1)
    assert (tmp_path / "page.html").stat().st_size < 300_000


def test_forty_eight_megapixels(checkpoint, tmp_path):
    path, out = tmp_path / "large.png", tmp_path / "out"
    Image.linear_gradient("L").resize((8000, 6000), Image.Resampling.NEAREST).save(path, compress_level=1)
    words = [checkpoint, path, "--classes", "dog, cat", "--output", out, "--html", tmp_path / "page.html"]
    assert run(*words) == 0
    with Image.open(out / "large_mask.png") as mask:
        assert mask.size == (8000, 6000)
    with Image.open(out / "large_input_pred_label.png") as picture:
        assert max(picture.size) == 1920


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif", "gif", "bmp"])
def test_damaged_files_of_every_kind_cost_one_line_at_most(checkpoint, photo, tmp_path, capsys, kind):
    rng, folder = np.random.default_rng(5), tmp_path / "damaged"
    folder.mkdir()
    with Image.open(photo) as picture:
        picture.save(tmp_path / f"whole.{kind}")
    whole = np.frombuffer((tmp_path / f"whole.{kind}").read_bytes(), np.uint8)
    for number in range(12):
        data = whole.copy()
        data[rng.integers(0, min(len(data), 400), 8)] = rng.integers(0, 256, 8)
        (folder / f"{number}.{kind if kind != 'gif' else 'png'}").write_bytes(data[: len(data) - 40 * number])
    words = [checkpoint, folder, photo, "--classes", "dog, cat", "--output", tmp_path / "out"]
    status = run(*words, "--modes", "mask")
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert (tmp_path / "out/photo.json").exists()
    assert status == (1 if lines else 0)
    assert len(lines) + len(captured.out.splitlines()) == 13
    assert all(line.startswith(f"error: {folder}") for line in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{weights}", "{dir}/none.jpg", "--classes", "dog"], "no such image file"),
        (["{weights}", "{dir}/none*.jpg", "--classes", "dog"], "matches no file"),
        (["{weights}", "{dir}/empty", "--classes", "dog"], "no picture in this folder"),
        (["{weights}", "{dir}/text.jpg", "--classes", "dog"], "cannot be read as an image"),
        (
            ["{weights}", "{dir}/thin.png", "--classes", "dog", "--protocol", "official"],
            "less than one patch",
        ),
        (["{weights}", "{photo}", "--classes", ""], "class list is empty"),
        (["{weights}", "{photo}", "--classes", "dog,,cat"], "empty name"),
        (["{weights}", "{photo}", "--classes", "dog, dog"], "'dog' occurs twice"),
        (["{weights}", "{photo}", "--classes", "sofa|"], "empty synonym"),
        (["{weights}", "{photo}", "--classes", "background"], "nothing but background"),
        (["{weights}", "{photo}", "--classes", "{dir}/none.txt"], "no such class list"),
        (
            ["{weights}", "{photo}", "--classes", "dog", "--background", "--background-threshold", "2"],
            "0 to 1",
        ),
        (["{weights}", "{photo}", "--classes", "dog, Background"], "a rule, not a name"),
        (["{weights}", "{photo}", "--classes", "dog", "--json", "{dir}"], "is a folder"),
        (["{weights}", "{photo}", "--classes", "dog", "--html", "{dir}"], "is a folder"),
        (["{weights}", "{photo}", "--classes", "dog", "--modes", "final_groups"], "did you mean final_group"),
        (["{dir}/none", "{photo}", "--classes", "dog"], "{dir}/none"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(checkpoint, photo, tmp_path, capsys, words, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("no picture")
    Image.new("RGB", (1, 9000)).save(tmp_path / "thin.png")
    places = {"{weights}": checkpoint, "{dir}": tmp_path, "{photo}": photo}
    for key, place in places.items():
        words = [word.replace(key, str(place)) for word in words]
    before = sorted(tmp_path.rglob("*"))
    assert run(*words, "--output", tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message.replace("{dir}", str(tmp_path)) in captured.err
    assert sorted(tmp_path.rglob("*")) == before
