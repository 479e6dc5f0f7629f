"""The demo's web server: loopback only, standard library, every request bounded in size and time.

A page elsewhere on the web must not reach it through the visitor's browser: requests whose Host is no name of
this machine (DNS rebinding) or whose Origin is another page are refused, and the answers forbid framing.
"""

from __future__ import annotations

import json
import re
import socket
import socketserver
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from groupvit_fast.console import UserError
from groupvit_fast.segmentation.page import web_file
from groupvit_fast.segmentation.studio import MOST_BYTES, SAMPLES, Studio, UnknownPhoto, sample_image

LOOPBACK = "127.0.0.1"
OWN_NAMES = ("127.0.0.1", "localhost", "[::1]")
MOST_TEXT = 1 << 20
MOST_CONNECTIONS = 64
QUIET_SECONDS = 15.0  # without a byte from the client
BODY_SECONDS = 60.0
CHUNK = 1 << 16
FILES = {
    "/": ("demo.html", "text/html"),
    "/style.css": ("style.css", "text/css"),
    "/demo.css": ("demo.css", "text/css"),
    **{f"/{name}.js": (f"{name}.js", "text/javascript") for name in ("maps", "lists", "viewer", "demo")},
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Refused(Exception):
    """A request that gets an error status and one line; the connection ends where its body was not read."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class DemoServer(ThreadingHTTPServer):
    """Serves one `Studio`; port 0 takes a free one. UserError where the port is taken."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, studio: Studio, port: int) -> None:
        self.studio = studio
        self.places = threading.BoundedSemaphore(MOST_CONNECTIONS)
        try:
            super().__init__((LOOPBACK, port), Handler)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"port {port}: {reason}; choose another --port, or 0 for a free one") from None

    @property
    def address(self) -> str:
        return f"http://{LOOPBACK}:{self.server_address[1]}"

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own would ask DNS for a name nobody needs
        self.server_name, self.server_port = self.server_address[:2]

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        if not self.places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: socket.socket, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):  # a client that went away is no event
            print(f"error: {type(error).__name__}: {error}", file=sys.stderr)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "groupvit_fast", ""
    timeout = QUIET_SECONDS
    disable_nagle_algorithm = True
    server: DemoServer

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_HEAD(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, *_: Any) -> None:
        pass

    # ---- routes

    def _get(self) -> tuple[str, bytes]:
        path = self.path.partition("?")[0]
        if self._length():
            raise Refused(HTTPStatus.BAD_REQUEST, "no body is expected here")
        if path in FILES:
            name, kind = FILES[path]
            return f"{kind}; charset=utf-8", web_file(name).encode()
        if path == "/api/info":
            return _json(self.server.studio.info())
        sample = re.fullmatch(r"/samples/(\d{1,3})\.png", path)
        if sample and int(sample[1]) < SAMPLES:
            return "image/png", sample_image(int(sample[1]))
        raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")

    def _post(self) -> tuple[str, bytes]:
        routes = {"/api/photos": self._add_photo, "/api/segment": self._segment}
        if self.path not in routes:
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")
        return _json(routes[self.path]())

    def _add_photo(self) -> dict[str, Any]:
        return self.server.studio.add_photo(self._body(MOST_BYTES, "the file"))

    def _segment(self) -> dict[str, Any]:
        try:
            values = json.loads(self._body(MOST_TEXT, "the request"))
            photo, classes, background = (values.get(key) for key in ("photo", "classes", "background"))
        except (ValueError, RecursionError, AttributeError):
            raise Refused(HTTPStatus.BAD_REQUEST, "the request is no JSON object") from None
        number = isinstance(background, int | float) and not isinstance(background, bool)
        if not (isinstance(photo, str) and isinstance(classes, str) and (background is None or number)):
            raise Refused(HTTPStatus.BAD_REQUEST, "wanted: photo and classes as texts, background as number")
        return self.server.studio.segment(photo, classes, background)

    # ---- what every request goes through

    def _answer(self, route: Any) -> None:
        status = HTTPStatus.OK
        self.unread = self._claimed()
        try:
            self._check_sender()
            kind, body = route()
        except Refused as error:
            status, (kind, body) = error.status, _json({"error": str(error)})
        except UserError as error:
            gone = isinstance(error, UnknownPhoto)
            status = HTTPStatus.GONE if gone else HTTPStatus.UNPROCESSABLE_ENTITY
            kind, body = _json({"error": str(error)})
        except OSError:
            raise
        except Exception as error:
            print(f"error: {self.path}: {type(error).__name__}: {error}", file=sys.stderr)
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            kind, body = _json({"error": "the demo failed at this; its terminal says more"})
        self._send(status, kind, body)

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.close_connection = self.close_connection or self.unread
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        if self.unread:
            self._drain()

    def _check_sender(self) -> None:
        host = self.headers.get("Host", "")
        if re.sub(r":\d+$", "", host).lower() not in OWN_NAMES:
            raise Refused(HTTPStatus.FORBIDDEN, f"this demo answers under {', '.join(OWN_NAMES)} only")
        origin = self.headers.get("Origin")
        if origin is not None and origin.lower() != f"http://{host.lower()}":
            raise Refused(HTTPStatus.FORBIDDEN, "requests of other pages are refused")

    def _claimed(self) -> bool:
        """Whether the request says that a body follows."""
        return self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers

    def _length(self) -> int:
        text = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers or not re.fullmatch(r"\d{1,18}", text):
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "a body needs its length in Content-Length")
        return int(text)

    def _body(self, most: int, what: str) -> bytes:
        length, parts, deadline = self._length(), [], time.monotonic() + BODY_SECONDS
        if length > most:
            raise Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"{what} has {length / 2**20:.0f} MB; at most {most / 2**20:.0f} MB are taken",
            )
        left = length
        while left:
            part = self.rfile.read1(min(left, CHUNK))
            if not part or time.monotonic() > deadline:
                raise Refused(HTTPStatus.REQUEST_TIMEOUT, f"{what} did not arrive whole")
            parts.append(part)
            left -= len(part)
        self.unread = False
        return b"".join(parts)

    def _drain(self) -> None:
        """Swallow a refused body for a moment, or the client would see a reset instead of the answer."""
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + 2
        self.connection.settimeout(0.5)
        while time.monotonic() < deadline and self.connection.recv(CHUNK):
            pass


def _json(values: dict[str, Any]) -> tuple[str, bytes]:
    return "application/json", json.dumps(values, separators=(",", ":")).encode()
