import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from groupvit_fast.data import scan as scan_module
from groupvit_fast.data.scan import scan

pytestmark = pytest.mark.usefixtures("scanner")


def _scan_one(write_tar, path, image, caption=b"a cat", name="k.jpg"):
    """Index a tar of one sample; returns (usable samples, reasons of rejection)."""
    index = scan(write_tar(path / "one.tar", [(name, image), ("k.txt", caption)]))
    return len(index), [reason for _, reason in index.rejected]


def test_offsets_sizes_and_keys(write_tar, tmp_path, noise_image):
    images = [noise_image(n, 20 + n, 30) for n in range(3)]
    members = [member for n in range(3) for member in ((f"d/{n}.jpg", images[n]), (f"d/{n}.txt", b"t%d" % n))]
    tar = write_tar(tmp_path / "s.tar", members)
    index, data = scan(tar), tar.read_bytes()
    for n in range(3):
        start = index.image_offset[n]
        assert data[start : start + index.image_size[n]] == images[n]
        start = index.caption_offset[n]
        assert data[start : start + index.caption_size[n]] == b"t%d" % n
    assert index.width.tolist() == [20, 21, 22]
    assert index.height.tolist() == [30, 30, 30]
    assert [index.key(n) for n in range(3)] == ["d/0", "d/1", "d/2"]
    assert index.rejected == ()


@pytest.mark.parametrize(
    "key", ["img.v1.2", "with spaces", "日本-é", "deep/er/" + "x" * 180, "UPPER", "quote'\"\\"]
)
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_awkward_keys_are_found(write_tar, tmp_path, noise_image, key, format):
    members = [(f"{key}.JPG", noise_image(0)), (f"{key}.json", b"{}"), (f"{key}.TXT", b"a cat")]
    index = scan(write_tar(tmp_path / "s.tar", members, format=format))
    assert index.key(0) == key
    assert index.rejected == ()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_contents_decide_not_the_extension(write_tar, tmp_path, noise_image, kind):
    assert _scan_one(write_tar, tmp_path, noise_image(0, kind=kind)) == (1, [])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("cut", range(1, 10))
def test_image_cut_at_any_tenth_is_left_out(write_tar, tmp_path, noise_image, cut, kind):
    image = noise_image(0, 64, 64, kind)
    count, reasons = _scan_one(write_tar, tmp_path, image[: len(image) * cut // 10])
    assert count == 0
    assert len(reasons) == 1


@pytest.mark.parametrize(
    ("image", "caption", "reason"),
    [
        (b"", b"a cat", "empty image"),
        (b"<!DOCTYPE html><html>not found</html>", b"a cat", "HTML file, not a JPEG, PNG or WebP image"),
        (b"GIF89a\x01\x00\x01\x00\x00\x00\x00;", b"a cat", "GIF file, not a JPEG, PNG or WebP image"),
        (b"\xff\xd8\xff\xe0", b"a cat", "damaged JPEG header"),
        (b"\x00" * 200, b"a cat", "not a JPEG, PNG or WebP image"),
        (None, b"", "empty caption"),
        (None, b" \n\t&nbsp;\x00", "empty caption"),
    ],
)
def test_unusable_samples_are_named(write_tar, tmp_path, noise_image, image, caption, reason):
    image = noise_image(0) if image is None else image
    assert _scan_one(write_tar, tmp_path, image, caption) == (0, [reason])


def test_trailing_garbage_and_odd_captions_are_kept(write_tar, tmp_path, noise_image):
    assert _scan_one(write_tar, tmp_path, noise_image(0) + b"\0" * 100) == (1, [])
    assert _scan_one(write_tar, tmp_path, noise_image(0), b"\xff\xfe caf\xe9") == (1, [])
    assert _scan_one(write_tar, tmp_path, noise_image(0), b"word " * 200_000) == (1, [])


def test_jpeg_with_a_header_longer_than_the_first_look(write_tar, tmp_path, encode_image):
    pixels = np.zeros((8, 9, 3), np.uint8)
    image = encode_image(pixels, icc_profile=bytes(200_000))
    assert len(image) > 200_000
    index = scan(write_tar(tmp_path / "s.tar", [("k.jpg", image), ("k.txt", b"a")]))
    assert (index.width[0], index.height[0]) == (9, 8)


def test_too_many_pixels_are_refused(write_tar, tmp_path, noise_image, monkeypatch):
    monkeypatch.setattr(scan_module, "MAX_PIXELS", 300)
    assert _scan_one(write_tar, tmp_path, noise_image(0, 20, 16)) == (
        0,
        ["20 x 16 pixels is above the limit of 300"],
    )


def test_size_is_that_of_the_upright_picture(write_tar, tmp_path, encode_image):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = encode_image(np.zeros((10, 30, 3), np.uint8), exif=exif.tobytes())
    index = scan(write_tar(tmp_path / "s.tar", [("k.jpg", image), ("k.txt", b"a")]))
    assert (index.width[0], index.height[0]) == (10, 30)


def test_incomplete_and_repeated_samples(write_tar, tmp_path, noise_image):
    members = [("a.jpg", noise_image(0)), ("b.txt", b"text"), ("c.jpg", noise_image(1)), ("c.txt", b"first")]
    members += [("c.txt", b"second"), (".hidden.jpg", noise_image(2)), ("noextension", b"x"), ("d.cls", b"5")]
    tar = write_tar(tmp_path / "s.tar", members)
    index = scan(tar)
    assert len(index) == 1
    assert set(index.rejected) == {
        ("a", "no caption"),
        ("b", "no image"),
        ("c", "second caption of the same name ignored"),
    }
    start = index.caption_offset[0]
    assert tar.read_bytes()[start : start + 5] == b"first"


def test_links_and_folders_are_not_followed(tmp_path, noise_image):
    secret = tmp_path / "secret.txt"
    secret.write_text("do not read")
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        image = tarfile.TarInfo("k.jpg")
        image.size = len(noise_image(0))
        archive.addfile(image, io.BytesIO(noise_image(0)))
        for kind, name in (
            (tarfile.SYMTYPE, "k.txt"),
            (tarfile.LNKTYPE, "k.text"),
            (tarfile.DIRTYPE, "f.jpg"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(secret)
            archive.addfile(member)
    assert scan(tmp_path / "s.tar").rejected == (("k", "no caption"),)


def test_truncated_tar_keeps_the_whole_samples(make_shards, tmp_path):
    (tar,) = make_shards(6)
    whole = scan(tar)
    end = int(whole.image_offset[4] + whole.image_size[4] // 2)
    cut = tmp_path / "cut.tar"
    cut.write_bytes(tar.read_bytes()[:end])
    index = scan(cut)
    assert len(index) == 4
    assert any("cut" in reason for _, reason in index.rejected)


def test_broken_header_in_the_middle_is_reported(make_shards):
    (tar,) = make_shards(6)
    data = bytearray(tar.read_bytes())
    header = int(scan(tar).image_offset[3]) - 512
    data[header : header + 512] = b"\xaa" * 512
    tar.write_bytes(data)
    index = scan(tar)
    assert [index.key(n) for n in range(len(index))] == [f"{n:09d}" for n in (0, 1, 2, 4, 5)]
    assert index.rejected == (
        ("000000.tar", f"damaged header near byte {header}"),
        ("000000003", "no image"),
    ), "what follows the damage is found again"


def test_header_with_a_negative_size_leads_nowhere(make_shards):
    (tar,) = make_shards(4)
    data = bytearray(tar.read_bytes())
    header = int(scan(tar).image_offset[2]) - 512
    data[header + 124 : header + 136] = (-1024 & (2**96 - 1)).to_bytes(12, "big")
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
    tar.write_bytes(data)
    index = scan(tar)
    assert [index.key(n) for n in range(len(index))] == [f"{n:09d}" for n in (0, 1, 3)]
    assert ("000000002", "no image") in index.rejected


def rewrite_header(data, start, field, value):
    """Change a field of the tar header at `start`, with a sound sum."""
    data[start + field : start + field + len(value)] = value
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])


def test_a_link_has_no_data_whatever_its_size_says(make_shards):
    (tar,) = make_shards(3)
    data = bytearray(tar.read_bytes())
    link = bytearray(data[:512])
    rewrite_header(link, 0, 156, b"2")
    assert int(link[124:135], 8) > 0
    tar.write_bytes(link + data)
    index = scan(tar)
    assert len(index) == 3
    assert index.rejected == ()


def test_a_size_that_no_file_has_is_damage(make_shards):
    (tar,) = make_shards(3)
    data = bytearray(tar.read_bytes())
    header = int(scan(tar).image_offset[1]) - 512
    rewrite_header(data, header, 124, b"\x80\0\0\0" + b"\xff" * 8)
    tar.write_bytes(data)
    index = scan(tar)
    assert index.rejected == (
        ("000000.tar", f"damaged header near byte {header}"),
        ("000000001", "no image"),
    )


def test_a_large_size_in_base_256_is_read(make_shards):
    (tar,) = make_shards(3)
    data = bytearray(tar.read_bytes())
    whole = scan(tar)
    rewrite_header(data, 0, 124, b"\x80" + int(whole.image_size[0]).to_bytes(11, "big"))
    tar.write_bytes(data)
    assert np.array_equal(scan(tar).image_size, whole.image_size)


def test_complaints_name_members_that_are_no_text(tmp_path, noise_image):
    with tarfile.open(
        tmp_path / "s.tar", "w", format=tarfile.GNU_FORMAT, errors="surrogateescape"
    ) as archive:
        for _ in range(2):
            member = tarfile.TarInfo("bad\udcff.jpg")
            member.size = len(noise_image(0))
            archive.addfile(member, io.BytesIO(noise_image(0)))
    assert scan(tmp_path / "s.tar").rejected == (
        ("bad\udcff", "second image of the same name ignored"),
        ("bad\udcff", "no caption"),
    )
