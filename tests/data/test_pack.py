"""Packing shards: every source, bounded, repeatable, continued after a kill, nowhere but in its folder."""

import base64
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import webdataset

from groupvit_fast import shards as command
from groupvit_fast.console import UserError, run_command

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def photos(tmp_path, noise_image):
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for n in range(7):
        path = folder / ("sub" if n % 2 else ".") / f"{n}.jpg"
        path.write_bytes(noise_image(n))
        path.with_suffix(".txt").write_text(f"picture {n}")
    return folder


def run(*arguments):
    assert command.main(["pack", *map(str, arguments), "--quiet"]) == 0


def contents(folder):
    """(image, caption) of all samples in the shards of a folder, in order."""
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = webdataset.WebDataset(shards, shardshuffle=False)
    return [
        (
            next(sample[kind] for kind in ("jpg", "jpeg", "png", "webp") if kind in sample),
            sample["txt"].decode(),
        )
        for sample in samples
    ]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_folder_with_text_files(photos, tmp_path, noise_image, capsys):
    (photos / "a.PNG").write_bytes(noise_image(9, kind="PNG"))
    (photos / "a.text").write_text("capital")
    (photos / "alone.jpg").write_bytes(noise_image(0))
    run(photos, tmp_path / "out")
    found = contents(tmp_path / "out")
    assert [caption for _, caption in found] == [f"picture {n}" for n in (0, 2, 4, 6)] + ["capital"] + [
        f"picture {n}" for n in (1, 3, 5)
    ]
    assert found[1][0] == noise_image(2)
    assert "alone.jpg: no .txt beside it" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
@pytest.mark.parametrize("in_base64", [False, True])
def test_text_tables(photos, tmp_path, noise_image, kind, in_base64, capsys):
    paths = ["0.jpg", "sub/1.jpg", "missing.jpg", str(photos / "2.jpg")]
    images = [base64.b64encode(noise_image(n)).decode() for n in (0, 1)] + ["%%%", ""] if in_base64 else paths
    captions = ['one, "two"', "é", "three", "four"]
    table = photos / f"table.{kind}"
    if kind == "jsonl":
        rows = [json.dumps({"img": i, "caption": c}) for i, c in zip(images, captions, strict=True)]
        table.write_text("\n".join(rows) + "\n\n")
    else:
        separator = "," if kind == "csv" else "\t"
        quoted = ['"' + caption.replace('"', '""') + '"' for caption in captions]
        rows = [separator.join(row) for row in [("img", "caption"), *zip(images, quoted, strict=True)]]
        table.write_text("\n".join(rows))
    run(table, tmp_path / "out", "--image-column", "img", *(["--base64"] if in_base64 else []))
    expected = [(noise_image(0), 'one, "two"'), (noise_image(1), "é"), (noise_image(2), "four")]
    assert contents(tmp_path / "out") == expected[: 2 if in_base64 else 3]
    assert ("not base64" if in_base64 else "missing.jpg: No such file") in capsys.readouterr().err


def test_parquet_with_paths_and_with_images(photos, tmp_path, noise_image):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    images = [noise_image(0), noise_image(1, kind="PNG"), b"no image", noise_image(3, kind="WEBP")]
    columns = {
        "path": ["0.jpg", "sub/1.jpg", "2.jpg", "sub/3.jpg"],
        "raw": images,
        "hub": [{"bytes": image, "path": "x"} for image in images],
        "text": ["a", "b", "c", "d"],
    }
    parquet.write_table(pyarrow.table(columns), photos / "t.parquet")
    run(photos / "t.parquet", tmp_path / "path")
    assert contents(tmp_path / "path") == [(noise_image(n), "abcd"[n]) for n in range(4)]
    for name in ("raw", "hub"):
        run(photos / "t.parquet", tmp_path / name, "--image-column", name)
        assert contents(tmp_path / name) == [(images[n], "abcd"[n]) for n in (0, 1, 3)]


def test_parquet_without_pyarrow_says_what_to_install(photos, tmp_path, monkeypatch):
    (photos / "t.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install 'groupvit-fast"):
        run(photos / "t.parquet", tmp_path / "out")


def test_class_folders(tmp_path, noise_image):
    for n, folder in enumerate(("n02", "n01", "polar_bear")):
        (tmp_path / "train" / folder / "more").mkdir(parents=True)
        (tmp_path / "train" / folder / "more" / "x.JPEG").write_bytes(noise_image(n))
    (tmp_path / "train" / "stray.jpg").write_bytes(noise_image(8))
    (tmp_path / "names").write_text("n01 tench, Tinca tinca\nn02\tgreat white shark\n")
    names = ["--class-names", tmp_path / "names"]
    run(tmp_path / "train", tmp_path / "out", "--class-template", "a photo of a {}.", *names)
    assert contents(tmp_path / "out") == [
        (noise_image(1), "a photo of a tench."),
        (noise_image(0), "a photo of a great white shark."),
        (noise_image(2), "a photo of a polar bear."),
    ]


def test_coco_captions(photos, tmp_path, noise_image):
    (tmp_path / "captions.json").write_text(
        json.dumps({
            "images": [{"id": 7, "file_name": "2.jpg"}, {"id": 3, "file_name": "0.jpg"}],
            "annotations": [
                {"id": 2, "image_id": 7, "caption": " second "},
                {"id": 1, "image_id": 7, "caption": "first"},
                {"id": 5, "image_id": 3, "caption": "other"},
            ],
        })
    )  # fmt: skip
    run(tmp_path / "captions.json", tmp_path / "out", "--images", photos)
    assert contents(tmp_path / "out") == [(noise_image(0), "other"), (noise_image(2), "first")]
    run(tmp_path / "captions.json", tmp_path / "all", "--images", photos, "--every-caption")
    assert [caption for _, caption in contents(tmp_path / "all")] == ["other", "first", "second"]


def test_shards_are_bounded_by_samples_and_by_bytes(photos, tmp_path):
    run(photos, tmp_path / "three", "--per-shard", "3")
    assert len(list((tmp_path / "three").glob("*.tar"))) == 3
    one = (photos / "0.jpg").stat().st_size
    run(photos, tmp_path / "bytes", "--shard-mb", 2.5 * one / 1e6)
    assert len(list((tmp_path / "bytes").glob("*.tar"))) == 4
    run(photos, tmp_path / "tiny", "--shard-mb", 1e-6)
    assert len(list((tmp_path / "tiny").glob("*.tar"))) == 7, (
        "an image above the bound has a shard of its own"
    )
    assert contents(tmp_path / "three") == contents(tmp_path / "bytes") == contents(tmp_path / "tiny")


def test_a_killed_pack_continues_to_the_same_bytes(photos, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(photos, whole, "--per-shard", "1")
    program = (
        "import os, signal\n"
        "from groupvit_fast.data import pack, shards\n"
        "from groupvit_fast.shards import main\n"
        "replace = os.replace\n"
        "def die(source, target):\n"
        "    if str(target).endswith('000003.tar'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    replace(source, target)\n"
        "os.replace = die\n"
        f"main(['pack', {str(photos)!r}, {str(killed)!r}, '--per-shard', '1', '--quiet'])\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    assert not (killed / "000006.tar").exists()
    left = {path.name: path.stat().st_ino for path in killed.glob("*.tar")}
    assert left, "some shards were finished"
    (killed / ".pack.json.1234-abcd").write_text("half written when the run was killed")
    run(photos, killed, "--per-shard", "1")
    expected = {name: data for name, data in files(whole).items() if not name.endswith(".npz")}
    assert {name: data for name, data in files(killed).items() if not name.endswith(".npz")} == expected
    known = json.loads((killed / "pack.json").read_text())["shards"]
    assert {name: (killed / name).stat().st_ino for name in left if name in known}.items() & left.items()


def test_a_changed_source_is_packed_again_where_it_changed(photos, tmp_path, noise_image):
    out = tmp_path / "out"
    run(photos, out, "--per-shard", "2")
    before = {path.name: path.stat().st_ino for path in out.glob("*.tar")}
    (photos / "sub" / "3.txt").write_text("another text")
    (photos / "sub" / "5.jpg").unlink()
    run(photos, out, "--per-shard", "2")
    after = {path.name: path.stat().st_ino for path in out.glob("*.tar")}
    assert [name for name in after if before[name] == after[name]] == ["000000.tar", "000001.tar"]
    assert sorted(after) == ["000000.tar", "000001.tar", "000002.tar"], "what is no longer needed is gone"
    assert contents(out)[-1] == (noise_image(3), "another text")


def test_other_peoples_files_are_left_alone(photos, tmp_path, noise_image):
    out, victim = tmp_path / "out", tmp_path / "victim"
    out.mkdir()
    victim.write_text("precious")
    (out / "000000.tar").write_bytes(b"not ours")
    with pytest.raises(UserError, match="holds tar files that pack did not write"):
        run(photos, out)
    (out / "000000.tar").unlink()
    (out / ".000000.tar.tmp").symlink_to(victim)  # a link does not lead the writing out of the folder
    run(photos, out)
    (out / "000000.tar").unlink()
    (out / "000000.tar").symlink_to(victim)
    manifest = json.loads((out / "pack.json").read_text())
    manifest["shards"]["../victim"] = manifest["shards"]["000000.tar"]
    manifest["shards"]["000000.tar"] = None
    (out / "pack.json").write_text(json.dumps(manifest))
    run(photos, out)
    assert victim.read_text() == "precious"
    assert len(contents(out)) == 7
    with pytest.raises(UserError, match=r"holds shards packed from .*photos; choose another"):
        run(tmp_path, out)


def test_names_in_a_table_write_nothing_outside(photos, tmp_path, noise_image):
    (tmp_path / "up.jpg").write_bytes(noise_image(5))
    (photos / "t.csv").write_text("path,caption\n../up.jpg,from above\n")
    before = sorted(os.listdir(tmp_path))
    run(photos / "t.csv", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "out"])
    assert set(files(tmp_path / "out")) == {"000000.tar", "000000.tar.index.npz", "pack.json"}


@pytest.mark.parametrize(
    ("name", "content", "flags", "message"),
    [
        ("t.csv", "a,b\n1,2\n", [], "has the columns a, b; choose --image-column"),
        ("t.csv", "path,b\n1,2\n", [], "choose --caption-column"),
        ("t.jsonl", "{\n", [], "t.jsonl:1: not JSON"),
        ("t.jsonl", "[1]\n", [], "t.jsonl:1: expected an object"),
        ("t.json", "{}", [], "not COCO captions"),
        ("t.xls", "", [], "unknown kind of table"),
        ("t.parquet", "garbage", [], "not a readable parquet file"),
        ("folder/x.txt", "", [], "no image with a caption was found"),
        ("folder/x.txt", "", ["--class-template", "a photo"], "exactly once"),
        ("folder/x.txt", "", ["--per-shard", "0"], "room for at least one sample"),
    ],
)
def test_bad_sources_are_one_line(tmp_path, capsys, name, content, flags, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / name).write_text(content)
    source = tmp_path / name.partition("/")[0]
    assert run_command(command.main, ["pack", str(source), str(tmp_path / "out"), *flags]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
