"""Bytes for the HTTP port, and a gateway in front of a stream that must not notice them."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

JSON = {"content-type": "application/json"}
HEAD = b"POST /execute HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
BODY = b'{"job_id":"j","prompt":"x"}'
GET = b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n"


@asynccontextmanager
async def beside_a_stream(worker: Any, start_gateway: Any) -> AsyncIterator[Any]:
    """A gateway in front of `worker`, which streams beside whatever the test does and must not notice."""
    gateway = await start_gateway(
        worker.target,
        http_max_body_bytes=2**20,
        http_header_timeout_ms=400,
        http_body_timeout_ms=600,
        http_allowed_hosts="Models.Example",
        http_allowed_origins="https://app.example",
    )
    body = {"job_id": "canary", "prompt": "x"}
    async with gateway.http.stream("POST", "/execute", json=body) as canary:
        lines = canary.aiter_lines()
        assert await anext(lines) == "event: started"
        job = await worker.submitted()
        worker.fake.eager = True
        yield gateway
        assert (await gateway.http.get("/health/live")).status_code == 200
        while job.live:
            job.step()
        text = "\n".join([line async for line in lines])
    assert "event: end" in text
    assert "".join(json.loads(data)["t"] for data in re.findall(r'^data: (\{"t".*)$', text, re.M)) == "Hello world!"
    assert await worker.engine.wait_idle(10)


def parsed(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the first response."""
    head, _, rest = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(first.split(" ")[1]), headers, rest


async def post(gateway: Any, content: bytes | str, path: str = "/execute", **headers: str) -> httpx.Response:
    response: httpx.Response = await gateway.http.post(path, content=content, headers={**JSON, **headers})
    return response


def reason(response: httpx.Response) -> str:
    """The reason of the first refused field."""
    assert response.json()["error"]["code"] == "INVALID_REQUEST"
    return str(response.json()["error"]["details"]["fields"][0]["reason"])
