import gzip
import os
import time
from dataclasses import fields

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def

from groupvit_fast.console import UserError
from groupvit_fast.data import index as index_module
from groupvit_fast.data import index_files
from groupvit_fast.data.index import expand_shards, read_index, write_dali_index, write_index


def test_expand_shards_takes_braces_folders_globs_and_lists(tmp_path):
    for number in range(3):
        (tmp_path / f"{number:06d}.tar").touch()
    every = [tmp_path / f"{number:06d}.tar" for number in range(3)]
    assert expand_shards(f"{tmp_path}/{{000000..000002}}.tar") == every
    assert expand_shards(tmp_path) == every
    assert expand_shards([f"{tmp_path}/*.tar"]) == every
    assert expand_shards(f"{every[2]}::{every[0]}") == [every[2], every[0]]
    assert expand_shards([every[1], str(every[1])]) == [every[1], every[1]], "repeats are kept"


def test_expand_shards_takes_a_path_with_pattern_characters_literally(tmp_path):
    odd = tmp_path / "a{1..2}[x]*.tar"
    odd.touch()
    assert expand_shards(str(odd)) == [odd]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{tmp}/{{000000..000009}}.tar", r"000001.tar, .*000002.tar, .*000003.tar and 6 more"),
        ("{tmp}/none*.tar", r"none\*.tar: matches no file"),
        ("{tmp}/empty", "holds no .tar file"),
        ("{tmp}/{{000000..000009.tar", "braces do not match"),
        ("s3://bucket/000000.tar", "remote shards"),
        ("", "no shards given"),
        ([], "no shards given"),
    ],
)
def test_expand_shards_names_what_is_missing(tmp_path, spec, message):
    (tmp_path / "000000.tar").touch()
    (tmp_path / "empty").mkdir()
    spec = spec.format(tmp=tmp_path) if isinstance(spec, str) else spec
    with pytest.raises(UserError, match=message):
        expand_shards(spec)


def test_index_is_stored_beside_the_tar_and_used_again(make_shards, monkeypatch):
    (tar,) = make_shards(5)
    assert write_index(tar) == tar.with_name("000000.tar.index.npz")
    monkeypatch.setattr(index_module, "scan", None)  # a second scan would fail
    stored = read_index(tar)
    assert len(stored) == 5
    assert stored.key(3) == "000000003"


def test_changed_tar_is_scanned_again(make_shards):
    (tar,) = make_shards(5)
    assert len(read_index(tar)) == 5
    (larger,) = make_shards(7, folder="other")
    os.replace(larger, tar)
    assert len(read_index(tar)) == 7
    (same_size,) = make_shards(7, folder="other")
    os.utime(same_size, ns=(0, time.time_ns() + 10**9))
    os.replace(same_size, tar)
    assert read_index(tar).stamp[2] == tar.stat().st_mtime_ns


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 not a real archive"])
def test_damaged_stored_index_is_made_again(make_shards, content):
    (tar,) = make_shards(5)
    place = write_index(tar)
    place.write_bytes(content)
    assert len(read_index(tar)) == 5
    assert place.stat().st_size > 500


def test_read_only_shard_folder_uses_the_cache(make_shards, tmp_path, monkeypatch):
    (tar,) = make_shards(5)
    write = index_files.write_bytes_atomically

    def refuse(path, data):  # chmod does not stop root, so the file system's answer is played here
        if path.parent == tar.parent:
            raise PermissionError(13, "Permission denied", str(path))
        write(path, data)

    monkeypatch.setattr(index_files, "write_bytes_atomically", refuse)
    place = write_index(tar)
    assert place.is_relative_to(tmp_path / "cache" / "groupvit_fast")
    monkeypatch.setattr(index_module, "scan", None)
    assert len(read_index(tar)) == 5
    assert os.listdir(tar.parent) == [tar.name]


def test_no_writable_place_still_reads(make_shards, monkeypatch):
    def refuse(path, data):
        raise OSError(30, "Read-only file system", str(path))

    (tar,) = make_shards(5)
    monkeypatch.setattr(index_files, "write_bytes_atomically", refuse)
    assert write_index(tar) is None
    assert len(read_index(tar)) == 5


def test_given_cache_folder_is_the_only_place(make_shards, tmp_path):
    (tar,) = make_shards(5)
    place = write_index(tar, tmp_path / "mine")
    assert place.parent == tmp_path / "mine"
    assert os.listdir(tar.parent) == [tar.name]


def test_unreadable_tars_are_named(tmp_path, make_shards):
    (tar,) = make_shards(2)
    packed = tmp_path / "a.tar"
    packed.write_bytes(gzip.compress(tar.read_bytes()))
    with pytest.raises(UserError, match=r"a.tar: is compressed with gzip"):
        read_index(packed)
    packed.write_bytes(b"")
    with pytest.raises(UserError, match=r"a.tar: the shard is empty"):
        read_index(packed)


def test_dali_reader_agrees_with_the_index(write_tar, tmp_path, noise_image):
    """DALI's own webdataset reader, given our offsets, returns the same bytes."""
    members = [(f"a key with {n} spaces.jpg", noise_image(n)) for n in range(3)]
    captions = [(f"a key with {n} spaces.txt", f"caption {n}".encode()) for n in range(3)]
    tar = write_tar(tmp_path / "s.tar", members + captions)  # never side by side
    index = read_index(tar)
    write_dali_index(index, tmp_path / "s.idx")

    @pipeline_def(batch_size=3, num_threads=1, device_id=None)
    def reader():
        return tuple(
            fn.readers.webdataset(paths=[str(tar)], index_paths=[str(tmp_path / "s.idx")], ext=["jpg", "txt"])
        )

    images, texts = reader().run()
    assert [np.asarray(image).tobytes() for image in images] == [data for _, data in members]
    assert [np.asarray(text).tobytes() for text in texts] == [data for _, data in captions]


def test_a_stale_index_is_said_in_one_line_that_names_the_shard(make_shards, caplog):
    (tar,) = make_shards(5)
    read_index(tar)
    status = tar.stat()
    assert not caplog.messages
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns))  # size and time tell nothing: the hash does
    read_index(tar)
    assert caplog.messages == [f"{tar}: changed since it was indexed; it is indexed again"]
    read_index(tar)
    assert len(caplog.messages) == 1


def test_all_unusable_shards_are_named_at_once(tmp_path, make_shards):
    good = make_shards(3)
    (tmp_path / "a.tar").write_bytes(b"")
    (tmp_path / "b.tar").write_bytes(b"<html>404</html>")
    with pytest.raises(
        UserError, match=r"^2 shards cannot be used: .*a.tar: the shard is empty.*; .*b.tar: not a"
    ):
        index_module.read_indexes([tmp_path / "a.tar", *good, tmp_path / "b.tar"])


def test_stored_index_is_compact_and_complete(make_shards):
    (tar,) = make_shards(1000, per_shard=1000)
    place = write_index(tar)
    assert place.stat().st_size < 45 * 1000 + 4096
    fresh, stored = index_module.scan(tar), read_index(tar)
    for field in fields(fresh):
        assert np.array_equal(getattr(fresh, field.name), getattr(stored, field.name)), field.name
