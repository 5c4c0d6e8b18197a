"""Every case of bad HTTP around the body that applies (docs/bad-input.md), each with its exact outcome.

Beside each runs a stream that must not notice.
"""

from __future__ import annotations

import asyncio
import json
import re
import resource
from collections.abc import AsyncIterator
from typing import Any

import pytest

from service.helpers_bad_http import BODY, GET, HEAD, beside_a_stream, parsed, post
from tokenwire.engine.fake import FakeEngine


@pytest.fixture
async def gateway(worker: Any, start_gateway: Any) -> AsyncIterator[Any]:
    async with beside_a_stream(worker, start_gateway) as gateway:
        yield gateway


# What must not get past the parser: bytes, status, and whether the connection closes by itself.
RAW = {
    "H1 one large header": (GET[:-2] + b"x: " + b"a" * 17_000 + b"\r\n\r\n", 431),
    "H1 without an end": (GET[:-2] + b"x: " + b"a" * 20_000, 431),
    "H1 a name without an end": (GET[:-2] + b"a" * 20_000, 431),
    "H1 a path without an end": (b"GET /" + b"a" * 20_000, 431),
    "H1 many headers": (GET[:-2] + b"".join(b"x-%d: a\r\n" % n for n in range(101)) + b"\r\n", 431),
    "H2 negative length": (HEAD + b"content-length: -5\r\n\r\n" + BODY, 400),
    "H2 signed length": (HEAD + b"content-length: +27\r\n\r\n" + BODY, 400),
    "H2 two lengths": (HEAD + b"content-length: 27\r\ncontent-length: 28\r\n\r\n" + BODY, 400),
    "H2 two equal lengths": (HEAD + b"content-length: 27\r\ncontent-length: 27\r\n\r\n" + BODY, 400),
    "H2 length and chunks": (HEAD + b"content-length: 27\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "H2 chunks and length": (HEAD + b"transfer-encoding: chunked\r\ncontent-length: 27\r\n\r\n0\r\n\r\n", 400),
    "H2 length in words": (HEAD + b"content-length: many\r\n\r\n" + BODY, 400),
    "H2 huge length": (HEAD + b"content-length: 99999999999999999999999\r\n\r\n", 400),
    "H2 unknown coding": (HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400),
    "H2 bad chunk": (HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n", 400),
    "H16 no host": (b"GET /v1/models HTTP/1.1\r\nconnection: close\r\n\r\n", 400),
    "H16 two hosts": (b"GET / HTTP/1.1\r\nhost: localhost\r\nhost: localhost\r\nconnection: close\r\n\r\n", 400),
    "H19 unknown method": (b"FOO /execute HTTP/1.1\r\nhost: localhost\r\n\r\n", 405),
    "H28 HTTP/0.9": (b"GET /health/live\r\n\r\n", 400),
    "H28 HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "H28 HTTP/3.0": (b"GET / HTTP/3.0\r\nhost: localhost\r\n\r\n", 400),
    "H28 h2c": (GET[:-2] + b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAA\r\n\r\n", 400),
    "H28 websocket": (GET[:-2] + b"connection: upgrade\r\nupgrade: websocket\r\n\r\n", 400),
    "H28 smuggled line end": (b"GET / HTTP/1.1\r\nhost: localhost\r\nx: a\rb: c\r\n\r\n", 400),
    "H28 bare line feeds": (b"GET / HTTP/1.1\nhost: localhost\n\n", 400),
    "H28 space before colon": (b"GET / HTTP/1.1\r\nhost : localhost\r\n\r\n", 400),
    "H28 folded header": (b"GET / HTTP/1.1\r\nhost: localhost\r\nx: a\r\n b\r\n\r\n", 400),
    "H28 NUL in a header": (b"GET / HTTP/1.1\r\nhost: localhost\r\nx: a\x00b\r\n\r\n", 400),
    "H28 TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50, 400),
    "H28 connect": (b"CONNECT evil.test:443 HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
}


@pytest.mark.parametrize(("sent", "status"), RAW.values(), ids=RAW.keys())
async def test_malformed_http_is_answered_and_the_connection_closed(gateway: Any, sent: bytes, status: int) -> None:
    got, headers, body = parsed(await gateway.raw(sent))
    assert got == status
    assert headers["connection"] == "close"
    error = json.loads(body)["error"]
    assert error["correlation_id"] == headers["x-correlation-id"]


async def test_as_many_headers_as_allowed(gateway: Any) -> None:
    """H1."""
    padding = b"".join(b"x-%d: a\r\n" % n for n in range(98)) + b"connection: close\r\n"
    assert parsed(await gateway.raw(GET[:-2] + padding + b"\r\n"))[0] == 200


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
async def test_a_large_body_is_refused_before_it_is_read(gateway: Any, declared: bool) -> None:
    """H3."""
    if declared:
        parts = [HEAD + b"content-length: 2000000000\r\n\r\n"]
    else:
        chunk = b"10000\r\n" + b"a" * 65536 + b"\r\n"
        parts = [HEAD + b"transfer-encoding: chunked\r\n\r\n", *[chunk] * 17]
    status, headers, body = parsed(await gateway.raw(*parts))
    assert (status, headers["connection"]) == (413, "close")
    assert json.loads(body)["error"]["code"] == "BODY_TOO_LARGE"


async def test_a_body_in_small_chunks_is_a_body_like_any(worker: Any, start_gateway: Any) -> None:
    """H4."""
    gateway = await start_gateway(worker.target)
    worker.fake.eager = True
    body = json.dumps({"job_id": "j", "prompt": "x", "padding": "p" * 3 * 2**20}).encode()
    head = HEAD + b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n"
    # Piece by piece, so that this list does not raise the mark by more than its own size.
    pieces = (body[at : at + 10000] for at in range(0, len(body), 10000))
    sent = [head, *(b"".join(b"1\r\n%c\r\n" % byte for byte in piece) for piece in pieces), b"0\r\n\r\n"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status, _, answer = parsed(await gateway.raw(*sent))
    assert status == 200
    assert b"event: end" in answer
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


async def test_a_slow_head_and_a_slow_body_time_out(gateway: Any) -> None:
    """H5. Sending a byte now and then does not help."""

    async def drip(first: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        reading = asyncio.ensure_future(reader.read())
        writer.write(first)
        while not reading.done():
            writer.write(b"a")
            await asyncio.wait([reading], timeout=0.05)
        writer.close()
        return await reading

    for first in (b"GET /", GET[:-2] + b"x: ", HEAD + b"content-length: 1000\r\n\r\n"):
        status, headers, body = parsed(await asyncio.wait_for(drip(first), 20))
        assert (status, headers["connection"]) == (408, "close")
        assert json.loads(body)["error"]["code"] == "REQUEST_TIMEOUT"
    # A connection on which nothing is sent is closed too.
    assert parsed(await gateway.raw())[0] == 408


async def test_accept(gateway: Any) -> None:
    """H14."""
    refused = await gateway.http.get("/v1/models", headers={"accept": "image/png"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (406, "not_acceptable")
    assert (await gateway.http.get("/v1/models", headers={"accept": "application/json;q=0"})).status_code == 406
    for accept in ("*/*", "application/json", "image/png, */*;q=0.1", "text/event-stream"):
        assert (await gateway.http.get("/v1/models", headers={"accept": accept})).status_code == 200
    bare = GET.replace(b"/health/live", b"/v1/models")[:-2] + b"connection: close\r\n\r\n"
    assert parsed(await gateway.raw(bare))[0] == 200


async def test_hosts(gateway: Any) -> None:
    """H16. An address needs no permission: no page elsewhere can make it its own."""
    for host in ("evil.test", "localhost.evil.test", "evil.test:80", "a b", "models.example.evil.test", "[x]"):
        response = await gateway.http.get("/v1/models", headers={"host": host})
        assert (response.status_code, response.json()["error"]["code"]) == (421, "host_not_allowed"), host
    for host in ("localhost", "LOCALHOST:9", "127.0.0.1", "[::1]:8080", "models.example", "Models.Example:443"):
        assert (await gateway.http.get("/v1/models", headers={"host": host})).status_code == 200, host
    assert (await gateway.http.get("/health/ready", headers={"host": "pod.cluster.local"})).status_code == 200


ORIGINS = ["https://evil.test", "null", "http://localhost.evil.test", "https://app.example.evil.test", "file://", ""]


@pytest.mark.parametrize("origin", ORIGINS)
async def test_pages_elsewhere_are_refused(gateway: Any, origin: str) -> None:
    """H17, H18."""
    response = await post(gateway, BODY, origin=origin)
    preflight = {"origin": origin, "access-control-request-method": "POST"}
    asked = await gateway.http.options("/execute", headers=preflight)
    for answer in (response, asked):
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers


async def test_pages_of_ours_and_listed_ones_may_call(gateway: Any) -> None:
    """H18, W-53."""
    for origin, cors in (("https://app.example", True), (f"http://127.0.0.1:{gateway.port}", False)):
        response = await gateway.http.get("/v1/models", headers={"origin": origin})
        assert response.status_code == 200
        assert response.headers.get("access-control-allow-origin") == (origin if cors else None)
    preflight = {"origin": "https://app.example", "access-control-request-method": "POST"}
    answer = await gateway.http.options("/execute", headers=preflight)
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert "content-type" in answer.headers["access-control-allow-headers"]
    refused = await post(gateway, b"{}", origin="https://app.example")
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (400, "https://app.example")


async def test_requests_that_a_page_elsewhere_provokes(gateway: Any) -> None:
    """H17. An image or a script of another page; a link to this page is welcome."""
    hidden = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    assert (await gateway.http.get("/v1/models", headers=hidden)).status_code == 403
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert (await gateway.http.get("/", headers=link)).status_code == 200


@pytest.mark.parametrize("method", ["TRACE", "PUT", "DELETE", "PATCH", "GET", "OPTIONS"])
async def test_other_methods(gateway: Any, method: str) -> None:
    """H19."""
    response = await gateway.http.request(method, "/execute")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert response.json()["error"]["code"] == "METHOD_NOT_ALLOWED"


PATHS = ["/v1/../admin", "//", "//health/live", "/%2e%2e/health", "/health/live;x", "/health/live/", "/etc/passwd"]


@pytest.mark.parametrize("path", [*PATHS, "/page.css/..", "/.git/config", "/health/../v1/models", "/%00", "/HEALTH"])
async def test_paths_are_taken_as_they_are(gateway: Any, path: str) -> None:
    """H20."""
    sent = f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()
    assert parsed(await gateway.raw(sent))[0] == 404


async def test_pipelined_requests_are_answered_in_order_and_not_without_end(gateway: Any) -> None:
    """H27."""
    requests = b"".join(
        b"GET /health/live HTTP/1.1\r\nhost: localhost\r\nx-correlation-id: n%d\r\n\r\n" % n for n in range(20)
    )
    answer = (await gateway.raw(requests)).decode()
    ids = re.findall(r"x-correlation-id: (n\d+)", answer)
    assert ids == [f"n{n}" for n in range(len(ids))]
    assert 1 <= len(ids) <= 9


async def test_a_stream_that_is_not_read_is_given_up(worker: Any, start_gateway: Any, start_worker: Any) -> None:
    """A browser that stops reading holds up its own job only, and not for ever."""
    other = await start_worker(fake=FakeEngine(["x" * 200_000] * 200))
    gateway = await start_gateway(other.target, http_stalled_reader_ms=300)
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=1024)
    writer.write(HEAD + b"content-length: %d\r\n\r\n" % len(BODY) + BODY)
    job = await other.submitted()
    while job.live and not job.cancelled.is_set():
        job.step()
        await asyncio.sleep(0.002)
    assert await other.engine.wait_idle(20)
    writer.close()
    del reader
