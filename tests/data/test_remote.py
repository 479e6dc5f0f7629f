"""Remote shards over a server on loopback that fails in every way a server can."""

import itertools
import logging
import os
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from loading import take

from groupvit_fast.console import UserError
from groupvit_fast.data import batches, remote
from groupvit_fast.data.pipeline import TrainLoader
from groupvit_fast.data.remote import MissingShard, ShardCache


class Server:
    """Serves files; `behave` maps a path to a list of what goes wrong at each request, then all is well."""

    def __init__(self):
        self.files, self.behave, self.asked = {}, {}, Counter()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked[self.path] += 1
                how = outer.behave.get(self.path, [])
                outer.answer(self, how.pop(0) if how else "well")

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def answer(self, request, how):
        body = self.files.get(request.path, b"")
        code = how if isinstance(how, int) else 200 if request.path in self.files else 404
        request.send_response(code)
        if how != "closes early":  # without a length the end of the stream is all that the client sees
            request.send_header("Content-Length", len(body) + (1000 if how == "wrong length" else 0))
        request.end_headers()
        if code != 200:
            return
        half = len(body) // 2
        if how == "slow":
            for start in range(0, len(body), half + 1):
                request.wfile.write(body[start : start + half + 1])
                time.sleep(0.3)
        elif how == "stalls":
            request.wfile.write(body[:half])
            time.sleep(30)
        else:
            request.wfile.write(body[:half] if how in ("cut", "closes early") else body)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.02, 0.04))


@pytest.fixture
def shards(make_shards, server):
    """Three shards of 20 samples on the server; returns their local paths."""
    paths = make_shards(60)
    server.files = {f"/{path.name}": path.read_bytes() for path in paths}
    return paths


def make_loader(spec, cache, **options):
    options = {"batch_size": 10, "image_size": 8, "num_threads": 1, "quiet": True} | options
    return TrainLoader(spec, shard_cache=cache, **options)


def test_remote_batches_equal_local_ones(server, shards, tmp_path):
    url = f"{server.url}/{{000000..000002}}.tar"
    cache = ShardCache(tmp_path / "cache")
    loader = make_loader(url, cache, num_prompts=1)
    local = make_loader(shards, None, num_prompts=1)
    for one, other in zip(take(loader, 7), take(local, 7), strict=True):
        assert one.images.equal(other.images)
        assert one.texts.equal(other.texts)
    assert loader.reader.name(0) == f"{server.url}/000000.tar:000000000"
    assert loader.reader.fingerprint == local.reader.fingerprint
    again = make_loader(url, cache)
    again.load_state_dict(loader.state_dict())
    assert sum(server.asked.values()) == 3, "each shard is downloaded once"
    assert not list((tmp_path / "cache").glob(".*.part"))


@pytest.mark.parametrize(
    "how",
    [
        [500],
        [503, 500, 429],
        ["cut"],
        ["closes early"],
        ["wrong length"],
        ["slow"],
        ["cut", 500, "closes early"],
    ],
)
def test_passing_troubles_are_sat_out(server, shards, tmp_path, how, caplog):
    server.behave["/000001.tar"] = list(how)
    with caplog.at_level(logging.WARNING, logger="groupvit_fast"):
        path = ShardCache(tmp_path).fetch(f"{server.url}/000001.tar")
    assert path.read_bytes() == server.files["/000001.tar"]
    troubles = 0 if how == ["slow"] else len(how)
    assert server.asked["/000001.tar"] == 1 + troubles
    assert len(caplog.records) == troubles
    assert all("/000001.tar" in record.message for record in caplog.records)


@pytest.mark.slow
def test_a_stalled_server_counts_as_gone(server, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "STALL_SECONDS", 1)
    server.behave["/000001.tar"] = ["stalls"]
    start = time.perf_counter()
    ShardCache(tmp_path).fetch(f"{server.url}/000001.tar")
    assert server.asked["/000001.tar"] == 2
    assert time.perf_counter() - start < 15, "curl looks at the last five seconds"


@pytest.mark.parametrize(
    ("how", "message", "requests"),
    [(500, "error: 500", 4), ("cut", r"\(18\)", 4), ("wrong length", r"\(18\)", 4), (404, "error: 404", 1),
     (403, "error: 403", 1)],
)  # fmt: skip
def test_lasting_troubles_name_the_shard(server, shards, tmp_path, how, message, requests):
    server.behave["/000001.tar"] = [how] * 9
    with pytest.raises(UserError, match=rf"/000001.tar: .*{message}"):
        make_loader(f"{server.url}/{{000000..000002}}.tar", ShardCache(tmp_path / "cache"))
    assert server.asked["/000001.tar"] == requests
    assert len(list((tmp_path / "cache").glob("*.tar"))) <= 2, "nothing half-downloaded has its name"


def test_a_server_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"http://127.0.0.1:9/x.tar: not downloaded after 4 tries .*\(7\)"):
        ShardCache(tmp_path).fetch("http://127.0.0.1:9/x.tar")


def test_a_shard_that_really_ends_early_is_kept(server, shards, tmp_path, caplog):
    """A half-written tar is the same at every try; its index says what is lost."""
    server.files["/000001.tar"] = server.files["/000001.tar"][:30000]
    loader = make_loader(f"{server.url}/000001.tar", ShardCache(tmp_path / "cache"))
    assert 5 < loader.samples_per_epoch < 20
    assert server.asked["/000001.tar"] == 3
    assert "no end mark" in caplog.text


def test_missing_shards_are_an_error_unless_allowed(server, shards, tmp_path, caplog):
    url = f"{server.url}/{{000000..000004}}.tar"
    with pytest.raises(MissingShard, match=r"00000[34].tar: .*404"):
        make_loader(url, ShardCache(tmp_path / "cache"))
    loader = make_loader(url, ShardCache(tmp_path / "cache"), allow_missing=True)
    assert loader.samples_per_epoch == 60
    assert "000003.tar" in caplog.text
    with pytest.raises(UserError, match="none of the shards exists"):
        make_loader(f"{server.url}/7.tar", ShardCache(tmp_path / "cache"), allow_missing=True)


def test_a_cache_smaller_than_the_data(server, shards, tmp_path, sample_numbers):
    """Every sample still comes once an epoch, few shards at a time, and the order resumes."""
    size = len(server.files["/000000.tar"])
    cache = ShardCache(tmp_path / "cache", limit=int(2.5 * size))
    url = f"{server.url}/{{000000..000002}}.tar"
    loader = make_loader(url, cache)
    seen = [number for batch in take(loader, 12) for number in sample_numbers(batch)]
    for epoch in (seen[:60], seen[60:]):
        assert Counter(epoch) == Counter(range(60))
        runs = [shard for shard, _ in itertools.groupby(number // 20 for number in epoch)]
        assert len(runs) == 3, "a window holds one shard here"
    assert [n // 20 for n in seen[:60:20]] != [n // 20 for n in seen[60::20]] or seen[:60] != seen[60:]
    assert sum(path.stat().st_size for path in cache.folder.glob("*.tar")) <= cache.limit
    assert sum(server.asked.values()) <= 3 + 3 * 3 + 2
    before = sum(server.asked.values())
    resumed = make_loader(url, cache)
    assert sum(server.asked.values()) == before, "the indexes of absent shards are kept"
    state = loader.state_dict()
    resumed.load_state_dict(state)
    other = make_loader(url, ShardCache(tmp_path / "whole"))
    with pytest.raises(UserError, match="--shard-cache-gb"):
        other.load_state_dict(state)


def test_shards_of_the_next_window_come_before_they_are_needed(server, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "_FETCH_AHEAD", 1)
    cache = ShardCache(tmp_path / "cache", limit=int(2.5 * len(server.files["/000000.tar"])))
    loader = make_loader(f"{server.url}/{{000000..000002}}.tar", cache)
    fetch, callers = cache.fetch, Counter()

    def counted(url):
        callers[threading.current_thread().name.rpartition("_")[0], cache.path(url).exists()] += 1
        return fetch(url)

    monkeypatch.setattr(cache, "fetch", counted)
    take(loader, 12)
    assert callers["fetch-shards", False] >= 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fetch-shards")]


def test_a_shard_that_changed_on_its_server_is_said(server, shards, tmp_path):
    size = len(server.files["/000000.tar"])
    cache = ShardCache(tmp_path / "cache", limit=int(1.5 * size))
    loader = make_loader(f"{server.url}/{{000000..000002}}.tar", cache)
    server.files = dict.fromkeys(server.files, server.files["/000001.tar"])
    with pytest.raises(UserError, match=r"00000[02].tar: changed on its server"):
        take(loader, 6)


def test_processes_share_a_download(server, shards, tmp_path):
    server.behave["/000001.tar"] = ["slow"]
    url = f"{server.url}/000001.tar"
    caches = [ShardCache(tmp_path) for _ in range(4)]
    threads = [threading.Thread(target=cache.fetch, args=(url,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.asked["/000001.tar"] == 1


def test_pipes_and_s3(shards, tmp_path, monkeypatch, sample_numbers):
    """s3:// runs `aws s3 cp URL -`; here that is a script that knows one bucket."""
    tools = tmp_path / "bin"
    tools.mkdir()
    script = tools / "aws"
    script.write_text(
        '#!/bin/sh\n[ "$1 $2 $4" = "s3 cp -" ] || { echo "usage: $*" >&2; exit 2; }\n'
        f'file="{shards[0].parent}/${{3#s3://bucket/}}"\n'
        '[ -f "$file" ] || { echo "fatal error: An error occurred (404) when calling" >&2; exit 1; }\n'
        'exec cat "$file"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    cache = ShardCache(tmp_path / "cache")
    spec = ["s3://bucket/{000000..000001}.tar", f"pipe:cat {shards[2]} | cat"]
    loader = make_loader(spec, cache)
    seen = Counter(number for batch in take(loader, 6) for number in sample_numbers(batch))
    assert seen == Counter(range(60))
    with pytest.raises(MissingShard, match=r"s3://bucket/9.tar: fatal error: .*\(404\)"):
        cache.fetch("s3://bucket/9.tar")
    with pytest.raises(UserError, match=r"pipe:exit 3: not downloaded after 4 tries \(exit status 3\)"):
        cache.fetch("pipe:exit 3")


def test_remote_shards_need_a_cache(server, shards):
    with pytest.raises(UserError, match="--shard-cache DIR"):
        make_loader(f"{server.url}/000000.tar", None)


def test_a_folder_that_cannot_be_written(server, shards, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be kept"):
        ShardCache(tmp_path / "file").fetch(f"{server.url}/000000.tar")
