"""A worker as the answering side of a load, over HTTP/2 frames made by hand: some 20 µs of processor time an event."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, cast

from benchmarks import h2
from tokenwire.bench.load import Answer, Arrival
from tokenwire.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from typing_extensions import Self


class WireLoad:
    """Sends prompts over gRPC; its `send` is what a loop of `tokenwire.bench.load` takes.

    Args:
        target: `host:port` of a worker without TLS and keys.
        connections: how many carry the streams, in turns.
        prompts: by request number.
        max_tokens: of every request, greedy.
        banned_ids: token ids that may not be generated.
    """

    def __init__(
        self,
        target: str,
        *,
        connections: int,
        prompts: Callable[[int], str],
        max_tokens: int,
        banned_ids: Sequence[int],
    ) -> None:
        self._target = target
        self._num_connections = connections
        self._prompts = prompts
        self._request = pb.ExecuteRequest(
            max_tokens=max_tokens, temperature=0, logit_bias=dict.fromkeys(banned_ids, -100.0)
        )
        self._connections: list[_Connection] = []

    async def __aenter__(self) -> Self:
        host, _, port = self._target.rpartition(":")
        loop = asyncio.get_running_loop()
        for _ in range(self._num_connections):
            _, connection = await loop.create_connection(lambda: _Connection(self._target), host, int(port))
            self._connections.append(connection)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for connection in self._connections:
            connection.close()

    async def send(self, number: int) -> Answer:
        """Sends request `number` and reads its stream to the end."""
        request = pb.ExecuteRequest(job_id=f"load-{number}", prompt=self._prompts(number), seed=number)
        request.MergeFrom(self._request)
        return await self._connections[number % len(self._connections)].execute(request)


class _Stream:
    """The events of one call, as they come."""

    def __init__(self) -> None:
        self.done: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._buffer = bytearray()
        self._arrivals: list[Arrival] = []
        self._started = pb.Started()
        self._metrics = pb.Metrics()
        self._error = "INCOMPLETE"
        self._stop_reason = ""

    def feed(self, data: bytes) -> None:
        now = time.perf_counter()
        self._buffer += data
        while len(self._buffer) >= 5:
            end = 5 + int.from_bytes(self._buffer[1:5], "big")
            if len(self._buffer) < end:
                return
            event = pb.ExecuteEvent.FromString(bytes(self._buffer[5:end]))
            del self._buffer[:end]
            kind = event.WhichOneof("event")
            if kind == "token":
                if event.token.ids:
                    self._arrivals.append(Arrival(now, len(event.token.ids)))
            elif kind == "started":
                self._started = event.started
            elif kind == "metrics":
                self._metrics = event.metrics
            elif kind == "end":
                self._error, self._stop_reason = "", pb.StopReason.Name(event.end.stop_reason)
            elif kind == "error":
                self._error = event.error.code

    def end(self, error: str = "") -> None:
        if not self.done.done():
            started = self._started
            self.done.set_result(
                Answer(
                    tuple(self._arrivals),
                    error or self._error,
                    self._stop_reason,
                    started.prompt_tokens,
                    started.cached_tokens,
                    self._metrics.queue_ms,
                )
            )


class _Connection(asyncio.Protocol):
    def __init__(self, target: str) -> None:
        self._headers = h2.call_headers(target, "/tokenwire.v1.Inference/Execute")
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._streams: dict[int, _Stream] = {}
        self._next_stream = 1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(h2.opening())

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        for kind, flags, stream_id, payload in h2.frames(self._buffer):
            stream = self._streams.get(stream_id)
            if stream is None:
                answer = h2.answer_to(kind, flags, payload)
                if answer and self._transport is not None:
                    self._transport.write(answer)
                continue
            if kind == h2.DATA:
                stream.feed(payload)
            if kind == h2.RST_STREAM or (kind in (h2.DATA, h2.HEADERS) and flags & h2.END_STREAM):
                del self._streams[stream_id]
                stream.end()

    def connection_lost(self, exc: Exception | None) -> None:
        for stream in self._streams.values():
            stream.end("UNAVAILABLE")
        self._streams.clear()

    async def execute(self, request: pb.ExecuteRequest) -> Answer:
        if self._transport is None or self._transport.is_closing():
            return Answer(error_code="UNAVAILABLE")
        stream = self._streams[self._next_stream] = _Stream()
        self._transport.write(h2.call(self._headers, request.SerializeToString(), self._next_stream))
        self._next_stream += 2
        return await stream.done

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
