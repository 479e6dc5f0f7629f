import json
import subprocess
import sys

import pytest
import webdataset

from groupvit_fast import shards as command
from groupvit_fast.console import run_command
from groupvit_fast.data.shards import Pair, write_shards


def test_written_shards_read_back_with_webdataset(tmp_path, noise_image):
    pairs = [Pair(noise_image(n), "jpg", f"caption é {n}") for n in range(5)]
    shards = write_shards(iter(pairs), tmp_path, prefix="x-", samples_per_shard=2)
    assert [shard.name for shard in shards] == ["x-000000.tar", "x-000001.tar", "x-000002.tar"]
    dataset = webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False)
    read = [(sample["__key__"], sample["jpg"], sample["txt"].decode()) for sample in dataset]
    assert read == [(f"{n:09d}", pair.image, pair.caption) for n, pair in enumerate(pairs)]


def test_same_pairs_give_the_same_bytes(tmp_path, noise_image):
    pairs = [Pair(noise_image(n), "jpg", "text") for n in range(3)]
    (first,), (second,) = (write_shards(pairs, tmp_path / folder) for folder in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_interrupted_writing_leaves_no_half_shard(tmp_path):
    pairs = [Pair(b"jpeg", "jpg", "text"), Pair("not bytes", "jpg", "text")]
    with pytest.raises(ValueError, match="bytes"):
        write_shards(pairs, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_pack_index_check_stats(tmp_path, noise_image, capsys):
    photos, packed, report = tmp_path / "photos", tmp_path / "packed", tmp_path / "report.json"
    photos.mkdir()
    for n in range(5):
        image = noise_image(n)
        (photos / f"{n}.jpg").write_bytes(image[:-30] if n == 1 else image)
        (photos / f"{n}.txt").write_text("" if n == 2 else "a cat")
    assert command.main(["pack", str(photos), str(packed), "--per-shard", "3", "--quiet"]) == 0
    assert command.main(["index", str(packed), "--dali", "--json", str(report)]) == 0
    assert json.loads(report.read_text())["samples"] == 3
    assert (packed / "000001.idx").read_text().startswith("v1.2 2\njpg ")
    capsys.readouterr()
    assert command.main(["check", str(packed), "--json", str(report)]) == 1
    assert "000000.tar:000000001: truncated JPEG" in capsys.readouterr().out
    assert json.loads(report.read_text())["reasons"] == {
        "truncated JPEG (no end marker)": 1,
        "empty caption": 1,
    }
    assert command.main(["stats", str(packed), "--json", str(report)]) == 0
    assert json.loads(report.read_text())["image_width"]["max"] == 20
    assert json.loads(report.read_text())["different_captions"] == 1


def test_full_check_finds_what_the_index_cannot(make_shards, capsys):
    (tar,) = make_shards(4, hollow=[2])
    assert command.main(["check", str(tar)]) == 0
    assert command.main(["check", str(tar), "--verify", "full"]) == 1
    assert "000000.tar:000000002: cannot be decoded" in capsys.readouterr().out


def test_absent_shards_are_an_error_unless_they_may_be(make_shards, capsys, caplog):
    first, _ = make_shards(4, per_shard=2)
    pattern = str(first.parent / "{000000..000003}.tar")
    assert run_command(command.main, ["index", pattern]) == 1
    assert "000002.tar" in capsys.readouterr().err
    assert command.main(["index", pattern, "--allow-missing"]) == 0
    assert "4 usable samples in 2 shards" in capsys.readouterr().out
    assert any("2 of 4 shards are missing" in message for message in caplog.messages)


@pytest.mark.parametrize(
    "arguments",
    [["pack", "{tmp}/none", "{tmp}/out"], ["pack", "{tmp}", "{tmp}/out"], ["check", "{tmp}/none.tar"]],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments):
    assert run_command(command.main, [item.format(tmp=tmp_path) for item in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_indexing_starts_without_torch(tmp_path, make_shards):
    """Importing torch takes several times as long as indexing a shard of a thousand samples."""
    shards = [str(path) for path in make_shards(3)]
    code = (
        "import sys; from groupvit_fast import shards; status = shards.main(sys.argv[1:]); "
        "sys.exit(status or ('torch' in sys.modules and 'torch was imported'))"
    )
    for command_name in ("index", "check"):
        done = subprocess.run(
            [sys.executable, "-c", code, command_name, *shards], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "3 usable samples" in done.stdout
