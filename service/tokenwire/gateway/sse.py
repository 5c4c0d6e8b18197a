"""Server-sent events: frames, and the response that carries them.

A frame's data is one line of JSON, so that no text of a model can end a frame or forge a field.
"""

from __future__ import annotations

import asyncio
import json
import time
from json.encoder import encode_basestring
from typing import Protocol

from tokenwire.errors import TokenwireError
from tokenwire.gateway.asgi import Send
from tokenwire.gateway.body import ClientGoneError
from tokenwire.gateway.generation import Generation
from tokenwire.observe.logging import get_logger
from tokenwire.v1 import inference_pb2 as pb

HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
)
HEARTBEAT = b": heartbeat\n\n"

# Some readers end a line at these too, though the standard does not.
_LINE_ENDS = (("\x85", "\\u0085"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029"))


class Frames(Protocol):
    """What a stream looks like to its kind of client."""

    def event(self, event: pb.ExecuteEvent) -> bytes:
        """The frames of an event; may be none."""

    def failure(self, error: TokenwireError) -> bytes:
        """The last frames of a job that failed."""

    def done(self) -> bytes:
        """The last frames of a job that completed."""


def quoted(text: str) -> str:
    """The text as a JSON string on one line."""
    result: str = encode_basestring(text)
    if not result.isascii():
        for char, escape in _LINE_ENDS:
            result = result.replace(char, escape)
    return result


def dumps(value: object) -> str:
    """JSON on one line, ASCII."""
    return json.dumps(value, separators=(",", ":"))


async def stream_events(send: Send, generation: Generation, frames: Frames, heartbeat_s: float) -> None:
    """Sends a job's events until its end or the client's departure, and lets no silence grow longer than
    `heartbeat_s`.

    A client that does not read makes `send` wait; then nothing is read from the worker, and its job pauses.
    """
    await send({"type": "http.response.start", "status": 200, "headers": list(HEADERS)})
    writer = _Writer(send)
    heartbeat = asyncio.ensure_future(writer.keep_alive(heartbeat_s))
    try:
        while (event := await generation.read()) is not None:
            if frame := frames.event(event):
                await writer.write(frame)
        last = frames.done()
    except TokenwireError as error:
        last = frames.failure(error)
    except ClientGoneError:
        return
    except Exception:  # noqa: BLE001 - the client must hear that the stream is not complete
        get_logger().error("error", code="INTERNAL", exc_info=True)
        last = frames.failure(TokenwireError("INTERNAL"))
    finally:
        generation.close()
        heartbeat.cancel()
    await send({"type": "http.response.body", "body": last})


class _Writer:
    def __init__(self, send: Send) -> None:
        self._send = send
        self._wrote_at = time.monotonic()
        self._writing = False

    async def write(self, frame: bytes) -> None:
        self._writing = True
        await self._send({"type": "http.response.body", "body": frame, "more_body": True})
        self._writing = False
        self._wrote_at = time.monotonic()

    async def keep_alive(self, heartbeat_s: float) -> None:
        while True:
            left_s = heartbeat_s - (time.monotonic() - self._wrote_at)
            if left_s > 0:
                await asyncio.sleep(left_s)
            elif self._writing:  # a stalled reader needs no heartbeat
                await asyncio.sleep(heartbeat_s)
            else:
                await self.write(HEARTBEAT)
