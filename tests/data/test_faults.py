"""What real shards contain, from the tar to the batches: nothing stops a run, nothing good is lost."""

import gzip
import io
import logging
import tarfile

import numpy as np
import pytest
from PIL import Image

from groupvit_fast import shards as command
from groupvit_fast.console import UserError, run_command
from groupvit_fast.data.index import read_index
from groupvit_fast.data.pipeline import TrainLoader

pytestmark = pytest.mark.usefixtures("scanner")


def epoch(shards, samples, **options):
    """All batches of one epoch."""
    loader = TrainLoader(shards, batch_size=1, image_size=16, num_threads=1, **options)
    assert loader.samples_per_epoch == samples
    iterator = iter(loader)
    try:
        return [next(iterator) for _ in range(samples)]
    finally:
        iterator.close()


def first_rows(batches):
    """How often each caption was delivered, by its tokens."""
    rows = [tuple(batch.texts[batch.text_index[0, 0]].tolist()) for batch in batches]
    return sorted((row, rows.count(row)) for row in set(rows))


@pytest.fixture
def odd_images(encode_image, noise_image):
    turned = Image.Exif()
    turned[0x0112] = 6
    rgb = Image.open(io.BytesIO(noise_image(0)))
    grey16 = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) << 8)
    return {
        "cmyk": encode_image(rgb.convert("CMYK")),
        "grey": encode_image(rgb.convert("L")),
        "16-bit": encode_image(grey16, "PNG"),
        "palette": encode_image(rgb.convert("P"), "PNG"),
        "alpha": encode_image(rgb.convert("RGBA"), "PNG"),
        "png": noise_image(1, kind="PNG"),
        "webp": noise_image(1, kind="WEBP"),
        "1x1": encode_image(np.full((1, 1, 3), 200, np.uint8)),
        "wide": encode_image(np.full((20, 20_000, 3), 99, np.uint8)),
        "turned": encode_image(rgb, exif=turned.tobytes()),
        "progressive": encode_image(rgb, progressive=True),
        "garbage behind": noise_image(3) + b"garbage " * 500,
    }


def test_odd_images_are_all_trained_on(odd_images, write_tar, tmp_path):
    members = [(f"{name}.jpg", data) for name, data in odd_images.items()]
    members += [(f"{name}.txt", f"number {n}".encode()) for n, name in enumerate(odd_images)]
    tar = write_tar(tmp_path / "s.tar", members)  # images and captions never side by side
    batches = epoch(tar, len(odd_images))
    assert [count for _, count in first_rows(batches)] == [1] * len(odd_images)
    for batch in batches:
        assert batch.images.shape == (1, 3, 16, 16)
        assert batch.images.isfinite().all()


CAPTIONS = {
    "one megabyte": b"word " * 200_000,
    "not utf-8": b"\xff\xfe caf\xe9 \x80",
    "utf-8 cut at the limit": b"a" + "é".encode() * 5000,
    "control characters": bytes(range(1, 32)) + b"text \x7f \x1b[31mred\x1b[0m",
    "null bytes": b"\0a\0b\0",
    "html": b"<b>bold</b> &amp;amp; more",
    "right to left": "שלום \u202e".encode(),
    "control tokens": b"<|endoftext|> <|startoftext|>",
}
KEYS = [
    "img.v1.2", "with some spaces", "日本-é", "deep/er/" + "x" * 200, "UPPER", "quote'\"\\", "../../up",
    "/absolute", "new\nline", "esc\x1b[31m", "percent%s{}", "-rf", "~",
]  # fmt: skip


def test_odd_captions_are_all_trained_on(write_tar, tmp_path, noise_image):
    members = []
    for n, (name, caption) in enumerate(CAPTIONS.items()):
        members += [(f"{name}.jpg", noise_image(n)), (f"{name}.txt", caption)]
    batches = epoch(write_tar(tmp_path / "s.tar", members), len(CAPTIONS), num_prompts=2)
    assert [count for _, count in first_rows(batches)] == [1] * len(CAPTIONS)
    assert all(batch.texts.shape[1] <= 77 for batch in batches)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_odd_keys_are_all_trained_on(write_tar, tmp_path, noise_image, format, capsys):
    members = []
    for n, key in enumerate(KEYS):
        members += [(f"{key}.JPG", noise_image(n)), (f"{key}.json", b"{}"), (f"{key}.Txt", b"number %d" % n)]
    tar = write_tar(tmp_path / "s.tar", members, format=format)
    assert [read_index(tar).key(n) for n in range(len(KEYS))] == KEYS
    assert [count for _, count in first_rows(epoch(tar, len(KEYS)))] == [1] * len(KEYS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.tar", "s.tar.index.npz"], (
        "nothing is written"
    )
    assert command.main(["index", str(tar), "--dali", "--quiet"]) == 0


def test_names_that_are_no_text_can_be_printed(tmp_path, noise_image, capsys):
    with tarfile.open(
        tmp_path / "s.tar", "w", format=tarfile.GNU_FORMAT, errors="surrogateescape"
    ) as archive:
        for name in ("bad\udcff\x1b[31m.jpg", "good.jpg", "good.txt"):
            data = b"a cat" if name.endswith("txt") else noise_image(0)
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    flags = ["--json", str(tmp_path / "r.json"), "--quarantine", str(tmp_path / "q.txt")]
    assert command.main(["check", str(tmp_path / "s.tar"), *flags]) == 1
    assert "s.tar:bad\\udcff\\x1b[31m: no caption" in capsys.readouterr().out
    assert (tmp_path / "q.txt").read_bytes().endswith(b"s.tar:bad\xff\x1b[31m\tno caption\n")


def test_bad_samples_are_named_and_the_rest_is_trained_on(
    write_tar, tmp_path, noise_image, hollow_image, caplog
):
    whole = noise_image(0)
    bad = {
        "cut": whole[:-40], "empty": b"", "html": b"<html>404</html>", "gif": b"GIF89a" + bytes(40),
        "garbage": bytes(range(256)),
    }  # fmt: skip
    members = [
        member for name, data in bad.items() for member in ((f"{name}.jpg", data), (f"{name}.txt", b"a"))
    ]
    members += [("no text.jpg", whole), ("blank.jpg", whole), ("blank.txt", b" \n"), ("no image.txt", b"a")]
    members += [("hollow.jpg", hollow_image), ("hollow.txt", b"hollow")]  # only decoding tells
    for n in range(6):
        members += [(f"{n}.jpg", noise_image(n)), (f"{n}.txt", b"number %d" % n)]
    tar = write_tar(tmp_path / "s.tar", members)
    assert {key for key, _ in read_index(tar).rejected} == {*bad, "no text", "blank", "no image"}
    with caplog.at_level(logging.WARNING, "groupvit_fast"):
        batches = epoch(tar, 7)
    assert sum(count for _, count in first_rows(batches)) == 7
    assert len(first_rows(batches)) == 6, "each good one, and one more in place of the hollow one"
    assert any("s.tar:hollow cannot be decoded" in message for message in caplog.messages)
    assert command.main(["index", str(tar), "--verify", "full", "--quiet"]) == 0
    assert [count for _, count in first_rows(epoch(tar, 6))] == [1] * 6


def test_damaged_tars_are_trained_on_as_far_as_they_go(make_shards, write_tar, tmp_path, noise_image):
    (tar,) = make_shards(6)
    index = read_index(tar)
    data = bytearray(tar.read_bytes())
    data[int(index.image_offset[1]) - 512 : int(index.image_offset[1])] = bytes(512)  # its header is wiped
    del data[int(index.image_offset[4]) + 5 :]
    tar.write_bytes(data)
    (tmp_path / "none.tar").write_bytes(bytes(10240))  # a tar of no members
    batches = epoch([tar, tmp_path / "none.tar"], 3)
    assert len(first_rows(batches)) == 3
    reasons = dict(read_index(tar).rejected)
    assert reasons["000000001"] == "no image"
    assert reasons["000000004"] == "cut off by the end of the tar"


@pytest.mark.parametrize("compress", [gzip.compress, lambda data: data[:300], lambda data: b""])
def test_what_is_no_tar_stops_before_training_and_is_named(make_shards, compress, capsys):
    good, broken = make_shards(40, per_shard=20)
    broken.write_bytes(compress(broken.read_bytes()))
    with pytest.raises(UserError, match=r"000001.tar: "):
        epoch([good, broken], 40)
    assert run_command(command.main, ["index", str(good), str(broken)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_links_folders_and_devices_are_passed_over(tmp_path, noise_image):
    secret = tmp_path / "secret"
    secret.write_text("do not read")
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
        for n, kind in enumerate(kinds):
            for extension in ("jpg", "txt"):
                member = tarfile.TarInfo(f"{n}.{extension}")
                member.type, member.linkname = kind, str(secret)
                archive.addfile(member)
        for name, data in (("good.jpg", noise_image(0)), ("good.txt", b"a cat")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    index = read_index(tmp_path / "s.tar")
    assert [index.key(n) for n in range(len(index))] == ["good"]
    assert index.rejected == ()
    assert len(epoch(tmp_path / "s.tar", 1)) == 1
