import signal
import subprocess
import sys
from pathlib import Path

from groupvit_fast.data.index import read_index
from groupvit_fast.data.indexing import prepare_indexes, read_exclusions
from groupvit_fast.data.verify import undecodable_samples

REPOSITORY = Path(__file__).resolve().parents[2]


def test_full_verification_leaves_out_what_does_not_decode(make_shards):
    tars = make_shards(150, per_shard=100, hollow=[3, 70, 99, 149])
    first, second = prepare_indexes(tars, verify="full")
    assert first.rejected == tuple((f"{n:09d}", "cannot be decoded") for n in (3, 70, 99))
    assert len(first) == 97
    assert [second.key(n) for n in (0, len(second) - 1)] == ["000000100", "000000148"]
    assert undecodable_samples(first) == []
    assert read_index(tars[0]).verified == "full", "and it is stored"


def test_what_is_verified_is_not_decoded_again(make_shards, monkeypatch):
    tars = make_shards(4)
    prepare_indexes(tars, verify="full")
    monkeypatch.setattr("groupvit_fast.data.verify.undecodable_samples", None)
    assert len(prepare_indexes(tars, verify="full")[0]) == 4


def test_samples_named_in_a_file_are_left_out(make_shards, tmp_path):
    tars = make_shards(6, per_shard=3)
    quarantine = tmp_path / "quarantine.txt"
    quarantine.write_text(f"{tars[1]}:000000004\n{tars[0]}:000000000\tcannot be decoded\n")
    first, second = prepare_indexes(tars, exclude=read_exclusions(quarantine))
    assert first.rejected == (("000000000", "excluded"),)
    assert second.rejected == (("000000004", "excluded"),)
    assert len(read_index(tars[0])) == 2


def test_a_killed_index_continues(make_shards, monkeypatch):
    tars = make_shards(12, per_shard=2)
    program = (
        "import os, signal\n"
        "from groupvit_fast.data import indexing\n"
        "store, done = indexing.store_index, []\n"
        "def die(index, cache_dir):\n"
        "    if len(done) == 3:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    done.append(store(index, cache_dir))\n"
        "indexing.store_index = die\n"
        "from groupvit_fast.shards import main\n"
        f"main(['index', {str(tars[0].parent)!r}, '--verify', 'full', '--quiet'])\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    assert [read_index(tar).verified for tar in tars] == ["full"] * 3 + ["header"] * 3
    decoded = []
    monkeypatch.setattr(
        "groupvit_fast.data.verify.undecodable_samples", lambda index: decoded.append(index.tar) or []
    )
    assert sum(map(len, prepare_indexes(tars, verify="full"))) == 12
    assert decoded == tars[3:]
