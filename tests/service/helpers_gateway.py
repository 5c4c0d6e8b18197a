"""What the tests of the HTTP port share: a request, its stream of events, and waiting for what a gateway hears of."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx


def body(job_id: str = "job-1", **fields: Any) -> dict[str, Any]:
    return {"job_id": job_id, "prompt": "Hello", **fields}


async def started(lines: Any) -> str:
    """Reads a stream up to the payload of `started`."""
    async for line in lines:
        if line.startswith("data:"):
            return str(line)
    raise AssertionError("the stream ended")


@dataclass
class Event:
    kind: str
    id: str
    data: Any


async def events(response: httpx.Response) -> AsyncIterator[Event]:
    """The events of a stream, read as the standard says; comments come as events of the kind `:`."""
    fields: dict[str, str] = {}
    async for line in response.aiter_lines():
        if line.startswith(":"):
            yield Event(":", "", line)
        elif line:
            name, _, value = line.partition(": ")
            assert name not in fields, "one line of data a frame"
            fields[name] = value
        elif fields:
            yield Event(fields["event"], fields["id"], json.loads(fields["data"]))
            fields = {}
    assert not fields, "the stream ended inside a frame"


@contextlib.asynccontextmanager
async def executing(gateway: Any, **fields: Any) -> AsyncIterator[httpx.Response]:
    async with gateway.http.stream("POST", "/execute", json=body(**fields)) as response:
        yield response


async def status_of(gateway: Any, path: str, wanted: int) -> httpx.Response:
    """Asks until the answer has the wanted status; the gateway hears of a worker's change a moment later."""
    give_up_at = asyncio.get_running_loop().time() + 20
    while (response := await gateway.http.get(path)).status_code != wanted:
        assert asyncio.get_running_loop().time() < give_up_at, response.text
        await asyncio.sleep(0.01)
    return response
