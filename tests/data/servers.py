"""Servers on loopback for tests of remote shards: a web server with faults, and an S3 server.

A test module takes the fixtures that it needs by `web, impatient = servers.web, servers.impatient`.
"""

import functools
import hashlib
import logging
import os
import re
import socket
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from mae.data.store import connection, storage

_S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


class WebServer(ThreadingHTTPServer):
    """Serves `files` with ranges and ETags; what goes wrong, and how often, is set on the fly.

    Each request for a file takes the next of `faults`, or `always` when there are none:
    a status such as "503", "reset", "cut" (the body ends early), "endless" (the body has no length and ends
    early), "stall" (half of the body, then silence), "flip" (one bit), or "redirect <url>".
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.faults: list[str] = []
        self.always = ""
        self.has_ranges = self.has_etags = True
        self.has_lengths = True
        self.lists = False
        self.headers: dict[str, str] = {}
        """Sent with every file, in place of the right ones of the same name."""
        self.requests: list[tuple[str, str]] = []
        """Path and Range header of each request for a file, in the order of arrival."""
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is nothing to report."""


class _Handler(BaseHTTPRequestHandler):
    server: WebServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server, path = self.server, self.path.partition("?")[0]
        if path.endswith("/") and server.lists:
            names = [name.removeprefix(path) for name in server.files if name.startswith(path)]
            self._answer(200, "".join(f'<a href="{n}">{n}</a>' for n in names).encode(), {"Content-Type": "text/html"})
            return
        span = self.headers.get("Range", "")
        server.requests.append((path, span))
        fault = server.faults.pop(0) if server.faults else server.always
        if fault.isdigit():
            self._answer(int(fault), b"no")
        elif fault.startswith("redirect "):
            self._answer(302, b"", {"Location": fault.removeprefix("redirect ")})
        elif path not in server.files:
            self._answer(404, b"no")
        else:
            self._serve(server.files[path], span, fault)

    def _serve(self, data: bytes, span: str, fault: str) -> None:
        headers = {"ETag": f'"{hashlib.md5(data).hexdigest()}"'} if self.server.has_etags else {}
        status, body = 200, data
        wanted = re.fullmatch(r"bytes=([0-9]+)-([0-9]+)", span)
        if wanted and self.server.has_ranges:
            start, stop = int(wanted[1]), min(int(wanted[2]) + 1, len(data))
            if start >= len(data):
                self._answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                return
            status, body = 206, data[start:stop]
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        if fault == "flip":
            body = bytes([body[0] ^ 1]) + body[1:]
        self._answer(status, body, headers | self.server.headers, fault)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, fault: str = "") -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if fault == "endless" or not self.server.has_lengths:
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.close_connection = fault != "" or not self.server.has_lengths
        self.wfile.write(body[: len(body) // 2] if fault in ("cut", "endless", "stall", "reset") else body)
        self.wfile.flush()
        if fault == "stall":
            self.server.closing.wait()
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three attempts with hardly a pause, at hosts of which nothing is known yet."""
    for name in ("_answered", "_given_up"):
        monkeypatch.setattr(connection, name, set[str]())
    monkeypatch.setattr(connection, "ATTEMPTS", 3)
    monkeypatch.setattr(connection, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(connection, "LONGEST_WAIT_SECONDS", 0.02)


@pytest.fixture
def short_stalls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request may last one second."""
    monkeypatch.setattr(storage, "STALL_SECONDS", 1.0)


@pytest.fixture
def web(impatient: None) -> Iterator[WebServer]:
    """A web server on loopback without files."""
    server = WebServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()


@functools.cache
def _s3_endpoint() -> str:
    """One server for the whole test run, because the library keeps its clients as long."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    return f"http://{host}:{port}"


@pytest.fixture
def s3(impatient: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A boto3 client of an S3 server on loopback with one bucket called `bucket`, emptied at the end."""
    import boto3

    for name, value in _S3_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", _s3_endpoint())
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    yield client
    for entry in client.list_objects_v2(Bucket="bucket").get("Contents", ()):
        client.delete_object(Bucket="bucket", Key=entry["Key"])
    client.close()
