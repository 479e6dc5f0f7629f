"""Zero-shot classification: counts by hand, folders and shards, and one line for every fault."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from groupvit_fast.console import UserError, run_command
from groupvit_fast.evaluate import main
from groupvit_fast.model import create_model, load_model
from groupvit_fast.segmentation.classify import Classification, classify, open_images
from groupvit_fast.segmentation.evaluation import Ranks
from groupvit_fast.segmentation.prompts import TEMPLATE_SETS, class_embeddings

NAMES = ["red apple", "sea", "sand", "old boat", "tree", "box", "road"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    create_model("tiny", seed=0).save_pretrained(folder)
    return folder


def jpeg(rng) -> bytes:
    stream = io.BytesIO()
    pixels = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((90, 70)).save(stream, format="JPEG", quality=95)
    return stream.getvalue()


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(0)
    root = tmp_path / "val"
    for number, name in enumerate(NAMES):
        folder = root / name.replace(" ", "_")
        folder.mkdir(parents=True)
        for index in range(1 + number % 3):
            (folder / f"{index}.JPEG").write_bytes(jpeg(rng))
    return root


def run(*words) -> int:
    return run_command(main, [str(word) for word in words])


def test_counts_by_hand(folders, weights):
    model = load_model(weights, "cpu")
    images, names = open_images(folders, None)
    assert names == sorted(NAMES)
    result = classify(model, images, names, batch_size=4)
    text = class_embeddings(model.eval(), names, TEMPLATE_SETS["subset"])
    from groupvit_fast.data.classification import evaluation_batches

    right = [[0] * len(names) for _ in range(3)]
    for pixels, labels in evaluation_batches(images, batch_size=1, crop=64, resize=73):
        embedding = F.normalize(model.encode_image(pixels), dim=1)
        order = (embedding @ text.T)[0].argsort(descending=True).tolist()
        label = int(labels)
        for row, hit in enumerate((True, order[0] == label, label in order[:5])):
            right[row][label] += hit
    assert [list(row) for row in (result.images, result.top1, result.top5)] == right
    assert 0 < sum(result.top5) < sum(result.images)


def test_command_with_folders_and_shards(folders, weights, tmp_path, capsys):
    words = [weights, "--dataset", "imagenet", "--device", "cpu"]
    assert run(*words, "--root", folders, "--json", tmp_path / "a.json", "--output", tmp_path / "out") == 0
    assert "imagenet: 13 images, 7 classes" in capsys.readouterr().out
    first = json.loads((tmp_path / "a.json").read_text())
    known = {"resize": 73, "crop": 64, "precision": "fp32", "limit": None, "device": "cpu", "processes": 1}
    assert first["settings"] == {**known, "torch": torch.__version__}
    assert json.loads((tmp_path / "out/result.json").read_text()) == first
    order = sorted(NAMES)
    for shard in range(2):
        with tarfile.open(tmp_path / f"val-{shard}.tar", "w") as tar:
            paths = sorted(folders.rglob("*.JPEG"))[shard::2]
            for number, path in enumerate(paths):
                label = order.index(path.parent.name.replace("_", " "))
                for suffix, data in (("jpg", path.read_bytes()), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    (tmp_path / "names.txt").write_text("\n".join(order))
    pattern = tmp_path / "val-{0..1}.tar"
    assert (
        run(*words, "--root", pattern, "--class-file", tmp_path / "names.txt", "--json", tmp_path / "b.json")
        == 0
    )
    second = json.loads((tmp_path / "b.json").read_text())
    assert second["per_class"] == first["per_class"]
    assert second["top1"] == first["top1"]


def test_processes_share_the_images(folders, weights):
    model = load_model(weights, "cpu")
    images, names = open_images(folders, None)
    whole = classify(model, images, names)
    parts = []
    for rank in range(3):
        ranks = Ranks(rank, 3, lambda value: parts.append(value) or [])
        assert classify(model, images, names, ranks=ranks) is None
    assert torch.equal(sum(parts), torch.tensor([whole.images, whole.top1, whole.top5]))


def test_bfloat16(folders, weights, monkeypatch):
    model, seen = load_model(weights, "cpu"), []
    encode = model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda pixels: seen.append(encode(pixels)) or seen[-1])
    images, names = open_images(folders, None)
    half = classify(model, images, names, precision="bf16")
    full = classify(model, images, names)
    assert [part.dtype for part in seen] == [torch.bfloat16, torch.float32]
    assert half.images == full.images
    assert half.settings["precision"] == "bf16"


def test_limit(folders, weights):
    images, names = open_images(folders, None)
    assert sum(classify(load_model(weights, "cpu"), images, names, limit=5).images) == 5


@pytest.mark.parametrize("fault", ["names", "damaged", "nothing", "shard", "no names", "sweep", "knob"])
def test_faults_are_one_line(folders, weights, tmp_path, capsys, fault):
    words = [weights, "--dataset", "imagenet", "--root", folders, "--device", "cpu"]
    (tmp_path / "names.txt").write_text("\n".join(NAMES[:3]))
    if fault == "names":
        words += ["--class-file", tmp_path / "names.txt"]
        message = "has 7 class folders, the class file 3 names"
    elif fault == "damaged":
        (folders / "sea/0.JPEG").write_bytes(b"no picture")
        message = "sea/0.JPEG: not a JPEG"
    elif fault == "nothing":
        words[4] = tmp_path / "empty"
        (tmp_path / "empty/class").mkdir(parents=True)
        message = "no images in class folders"
    elif fault == "shard":
        words[4] = tmp_path / "x-{0..3}.tar"
        words += ["--class-file", tmp_path / "names.txt"]
        message = "x-0.tar: no such folder or shard"
    elif fault == "no names":
        words[4] = tmp_path / "x.tar"
        message = "give their names with --class-file"
    elif fault == "knob":
        words += ["--short-side", 90]
        message = "--short-side has no meaning for classification"
    else:
        words += ["--sweep"]
        message = "no background threshold"
    assert run(*words) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_shares():
    result = Classification(("a", "b"), (3, 1), (1, 1), (2, 1), ("{}",))
    assert (result.share(result.top1), result.share(result.top5)) == (0.5, 0.75)
    with pytest.raises(UserError, match="class number 2 has no name"):
        raise_for_label()


def raise_for_label():
    from groupvit_fast.data.classification import LabelledImage

    image = LabelledImage("x", jpeg(np.random.default_rng(1)), 2)
    classify(create_model("tiny", seed=0), [image], ["a", "b"])
