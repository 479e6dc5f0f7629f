"""The demo's server: what it answers, whom it refuses, and that garbage and slow clients do it no harm."""

import http.client
import io
import json
import socket
import struct
import threading
import time
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from PIL import Image

from groupvit_fast.console import UserError
from groupvit_fast.segmentation import protocol, server
from groupvit_fast.segmentation.server import DemoServer
from groupvit_fast.segmentation.studio import MOST_BYTES, Studio


@contextmanager
def running(model, chosen):
    with DemoServer(Studio(model, chosen, name="fake"), 0) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield found
        finally:
            found.shutdown()
            thread.join()


@pytest.fixture
def demo(tools):
    chosen = tools.replace(protocol("official"), short_side=32, crop=32, stride=16)
    with running(tools.FakeModel(), chosen) as found:
        yield found


@pytest.fixture
def photo(tools) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(tools.blobs(32, 40, np.random.default_rng(4))).save(buffer, "PNG")
    return buffer.getvalue()


def ask(demo, method, path, body=None, **headers):
    """(status, headers, body) of one request; JSON is read."""
    connection = http.client.HTTPConnection("127.0.0.1", demo.server_port, timeout=20)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
    finally:
        connection.close()
    kind = answer.headers["Content-Type"]
    return answer.status, answer.headers, json.loads(data) if kind == "application/json" and data else data


def send_raw(demo, data: bytes, *, end: bool = True) -> bytes:
    """The answer to any bytes; `end`: nothing more will come."""
    parts = []
    with socket.create_connection(("127.0.0.1", demo.server_port), timeout=20) as connection:
        try:
            connection.sendall(data)
            if end:
                with suppress(OSError):  # the server may have closed already
                    connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(1 << 16):
                parts.append(part)
        except ConnectionError:
            pass
    return b"".join(parts)


def alive(demo, photo) -> bool:
    status, _, part = ask(demo, "POST", "/api/photos", photo)
    return status == 200 and ask(demo, "POST", "/api/segment", segment_body(part["id"]))[0] == 200


def segment_body(photo: str, classes: str = "sea, sand", background=None) -> str:
    return json.dumps({"photo": photo, "classes": classes, "background": background})


def test_pages_and_their_headers(demo):
    for path, kind in (("/", "text/html"), ("/?x=1", "text/html"), ("/style.css", "text/css"),
                       ("/demo.js", "text/javascript"), ("/samples/0.png", "image/png"),
                       ("/api/info", "application/json")):  # fmt: skip
        status, headers, data = ask(demo, "GET", path)
        assert (status, headers["Content-Type"].split(";")[0]) == (200, kind), path
        assert data
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
    assert ask(demo, "HEAD", "/")[2] == b""
    for path in ("/nothing", "/../server.py", "/samples/8.png", "/samples/../0.png", "/web/demo.html"):
        assert ask(demo, "GET", path)[0] == 404
    assert ask(demo, "PUT", "/")[0] == 501


def test_it_listens_on_loopback_alone(demo):
    assert demo.socket.getsockname()[0] == "127.0.0.1"
    assert demo.address == f"http://127.0.0.1:{demo.server_port}"
    with pytest.raises(UserError, match="choose another --port"):
        DemoServer(demo.studio, demo.server_port)


def test_a_photo_and_edits_of_its_classes(demo, photo):
    status, _, part = ask(demo, "POST", "/api/photos", photo)
    assert status == 200
    assert part["picture"].startswith("data:image/png;base64,")
    for classes, background, total in (("sea, sand", None, 2), ("sea, sand, sky", 0.5, 4)):
        body = segment_body(part["id"], classes, background)
        status, _, labels = ask(demo, "POST", "/api/segment", body)
        assert (status, labels["total"]) == (200, total)
    status, _, answer = ask(demo, "POST", "/api/segment", segment_body(part["id"], "sea, sea"))
    assert (status, answer) == (422, {"error": "the class list: 'sea' occurs twice (in 'sea' and 'sea')"})
    assert ask(demo, "POST", "/api/segment", segment_body("0" * 24))[0] == 410


def test_other_pages_and_other_names_are_refused(demo, photo):
    port = demo.server_port
    for host in (
        "evil.example",
        f"evil.example:{port}",
        f"127.0.0.1.evil.example:{port}",
        "",
        "localhost@evil",
    ):
        assert ask(demo, "GET", "/api/info", Host=host)[0] == 403, host
        assert ask(demo, "POST", "/api/photos", photo, Host=host)[0] == 403, host
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", "LOCALHOST:8000", f"[::1]:{port}"):
        assert ask(demo, "GET", "/api/info", Host=host)[0] == 200, host
    own = f"http://127.0.0.1:{port}"
    for origin in (
        "http://evil.example",
        "null",
        f"https://127.0.0.1:{port}",
        f"http://127.0.0.1:{port + 1}",
    ):
        assert ask(demo, "POST", "/api/photos", photo, Origin=origin)[0] == 403, origin
    assert ask(demo, "POST", "/api/photos", photo, Origin=own)[0] == 200
    assert "Access-Control-Allow-Origin" not in ask(demo, "GET", "/api/info", Origin=own)[1]


def test_sizes_are_limited(demo, photo):
    head = "POST /api/photos HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n"
    for length, status in ((MOST_BYTES + 1, 413), (10**17, 413), (-5, 411), ("x", 411), (10**30, 411)):
        assert send_raw(demo, head.format(length).encode()).startswith(f"HTTP/1.1 {status}".encode())
    chunked = (
        "POST /api/photos HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
    )
    assert send_raw(demo, chunked.encode()).startswith(b"HTTP/1.1 411")
    status, _, answer = ask(demo, "POST", "/api/photos", bytes(MOST_BYTES + 1))
    assert (status, answer) == (413, {"error": "the file has 25 MB; at most 25 MB are taken"})
    assert ask(demo, "POST", "/api/segment", b" " * ((1 << 20) + 1))[0] == 413
    assert send_raw(demo, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n").startswith(b"HTTP/1.1 431")
    assert send_raw(demo, b"GET /" + b"a" * 70_000).startswith(b"HTTP/1.1 414")
    assert send_raw(demo, head.format(50).encode() + b"half").startswith(b"HTTP/1.1 408")
    assert alive(demo, photo)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"3", b"\xff\xfe", b"[" * 100_000, b'{"photo": 3}', b'{"photo": "a"}',
     b'{"photo": "a", "classes": ["b"]}', b'{"photo": "a", "classes": "b", "background": true}',
     b'{"photo": "a", "classes": "b", "background": "x"}'],
)  # fmt: skip
def test_a_request_that_is_none_is_named(demo, body):
    status, _, answer = ask(demo, "POST", "/api/segment", body)
    assert status == 400
    assert list(answer) == ["error"]


@pytest.mark.parametrize("background", [2, -1, float("nan"), float("inf")])
def test_a_threshold_out_of_range_is_named(demo, photo, background):
    part = ask(demo, "POST", "/api/photos", photo)[2]
    status, _, answer = ask(demo, "POST", "/api/segment", segment_body(part["id"], "sea", background))
    assert status == 422
    assert "0 to 1" in answer["error"]


def garbage(rng, photo: bytes) -> bytes:
    """Noise, a truncated photo, a damaged one, or one of another kind's magic bytes with noise behind."""
    kind, noise = rng.integers(0, 4), rng.bytes(int(rng.integers(0, 3000)))
    if kind == 0:
        return noise
    if kind == 1:
        return photo[: rng.integers(0, len(photo) - 60)]
    if kind == 2:
        data = np.frombuffer(photo, np.uint8).copy()
        data[rng.integers(0, 200, 20)] = rng.integers(0, 256, 20)
        return data.tobytes()
    heads = (
        b"\xff\xd8\xff\xe0",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"BM",
        b"II*\0",
        b"RIFF\0\0\0\0WEBPVP8 ",
        b"%!PS",
    )
    return heads[rng.integers(0, len(heads))] + noise


def test_a_thousand_garbage_uploads(demo, photo, capsys):
    rng, statuses = np.random.default_rng(0), []
    connection = http.client.HTTPConnection("127.0.0.1", demo.server_port, timeout=20)
    for _ in range(1000):
        connection.request("POST", "/api/photos", garbage(rng, photo))
        answer = connection.getresponse()
        statuses.append(answer.status)
        values = json.loads(answer.read())
        if answer.status != 200:
            assert set(values) == {"error"}
            assert "\n" not in values["error"]
    connection.close()
    assert set(statuses) <= {200, 422}
    assert statuses.count(422) > 900
    assert alive(demo, photo)
    assert capsys.readouterr().err == ""


def test_garbage_that_is_no_http(demo, photo, capsys):
    rng = np.random.default_rng(1)
    lines = (
        b"",
        b"\r\n\r\n",
        b"GET\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        b"GET / HTTP/1.1\r\n: x\r\n\r\n",
    )
    for data in [*lines, *(rng.bytes(300) for _ in range(60))]:
        send_raw(demo, data)
    assert alive(demo, photo)
    assert "Traceback" not in capsys.readouterr().err


def test_clients_that_vanish_are_no_event(demo, photo, capsys):
    head = f"POST /api/photos HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(photo)}\r\n\r\n"
    for data in (b"GET /api/info HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50, head.encode() + photo[:100]):
        for _ in range(5):
            connection = socket.create_connection(("127.0.0.1", demo.server_port))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(data)
            connection.close()  # at once, with a reset
    deadline = time.monotonic() + 10
    while demo.places._value < server.MOST_CONNECTIONS and time.monotonic() < deadline:
        time.sleep(0.01)
    assert alive(demo, photo)
    assert capsys.readouterr().err == ""


def test_slow_clients_do_not_block_others(demo, photo):
    slow = [socket.create_connection(("127.0.0.1", demo.server_port)) for _ in range(20)]
    try:
        for number, connection in enumerate(slow):
            head = b"POST /api/photos HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nstart"
            connection.sendall(head if number % 2 else b"GET / HT")
        start = time.monotonic()
        assert alive(demo, photo)
        assert time.monotonic() - start < server.QUIET_SECONDS / 3
    finally:
        for connection in slow:
            connection.close()


def test_a_silent_client_is_sent_away(demo, monkeypatch):
    assert 0 < server.Handler.timeout <= 30
    monkeypatch.setattr(server.Handler, "timeout", 0.2)
    start = time.monotonic()
    head = b"POST /api/photos HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nstart"
    for data in (b"", b"GET / HT", head):
        send_raw(demo, data, end=False)
    assert time.monotonic() - start < 10


def test_a_trickle_of_bytes_has_an_end(demo, monkeypatch):
    monkeypatch.setattr(server, "BODY_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", demo.server_port), timeout=20) as connection:
        connection.sendall(b"POST /api/photos HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n")
        for _ in range(10):
            connection.sendall(b"x")
            time.sleep(0.05)
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_connections_are_counted(demo, photo):
    crowd = [
        socket.create_connection(("127.0.0.1", demo.server_port)) for _ in range(server.MOST_CONNECTIONS)
    ]
    deadline = time.monotonic() + 10
    while demo.places._value and time.monotonic() < deadline:
        time.sleep(0.01)
    assert send_raw(demo, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n") == b""
    for connection in crowd:
        connection.close()
    while demo.places._value < server.MOST_CONNECTIONS and time.monotonic() < deadline:
        time.sleep(0.01)
    assert alive(demo, photo)


def test_many_at_once(demo, tools):
    """Eight clients, each with a photo of its own, get the labels of their own photo."""

    def encoded(seed):
        buffer = io.BytesIO()
        Image.fromarray(tools.blobs(32, 40, np.random.default_rng(seed))).save(buffer, "PNG")
        return buffer.getvalue()

    def segment(seed):
        part = ask(demo, "POST", "/api/photos", encoded(seed))[2]
        return ask(demo, "POST", "/api/segment", segment_body(part["id"], "sea, sand, sky, boat"))[2][
            "labels"
        ]

    alone, together = [segment(seed) for seed in range(8)], [None] * 8

    def work(seed):
        together[seed] = segment(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_a_fault_of_the_program_is_one_line_and_the_server_goes_on(demo, photo, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(demo.studio, "add_photo", lambda data: 1 / 0)
        status, _, answer = ask(demo, "POST", "/api/photos", photo)
    assert status == 500
    assert "terminal" in answer["error"]
    assert capsys.readouterr().err == "error: /api/photos: ZeroDivisionError: division by zero\n"
    assert alive(demo, photo)
