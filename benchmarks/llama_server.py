"""llama.cpp's server as the peer of a service benchmark: its process, and one streamed completion over HTTP."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from tokenwire.bench.load import Answer, Arrival


class LlamaServerLoad:
    """Sends prompts to llama-server's `/completion`, greedy, never ended by an end-of-generation token.

    One connection a request: the server closes it after a streamed reply.

    Args:
        port: on 127.0.0.1.
        prompts: text by request number.
        max_tokens: of every request.
    """

    def __init__(self, port: int, prompts: Callable[[int], str], max_tokens: int) -> None:
        self._port = port
        self._prompts = prompts
        self._max_tokens = max_tokens

    async def send(self, number: int) -> Answer:
        """Sends request `number` and reads its stream to the end. A refusal is an answer; a broken stream raises."""
        body = {
            "prompt": self._prompts(number),
            "n_predict": self._max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        arrivals: list[Arrival] = []
        async for event in post_events(self._port, "/completion", body):
            if "http_status" in event:
                return Answer(error_code=f"HTTP {event['http_status']}")
            if event.get("stop"):
                # Bytes that do not yet form a character are sent with a later token; their tokens count there.
                missing = event["tokens_predicted"] - len(arrivals)
                if missing and arrivals:
                    arrivals[-1] = Arrival(arrivals[-1].at_s, 1 + missing)
                stop_reason = "max_tokens" if event.get("stop_type", "limit") == "limit" else event["stop_type"]
                return Answer(tuple(arrivals), "", stop_reason, event["tokens_evaluated"])
            arrivals.append(Arrival(time.perf_counter(), 1))
        raise ConnectionError("llama-server ended a stream without its last event")


async def post_events(port: int, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """POSTs JSON and yields the server-sent events of the answer; of a refusal, `{"http_status": code}`."""
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
        await writer.drain()
        status = int((await reader.readline()).split()[1])
        chunked = False
        while (line := await reader.readline()) not in (b"\r\n", b""):
            chunked = chunked or line.lower().replace(b" ", b"") == b"transfer-encoding:chunked\r\n"
        if status != 200:
            yield {"http_status": status}
            return
        rest = b""
        async for part in _chunks(reader) if chunked else _parts(reader):
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])
    finally:
        writer.close()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The chunks of a chunked body."""
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def _parts(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """A body that ends with its connection, as it comes."""
    while part := await reader.read(65536):
        yield part
