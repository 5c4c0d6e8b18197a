"""The transport's settings by what they do on the wire: SETTINGS, pings, GOAWAY, and connections that are closed."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import psutil
import pytest

from tokenwire.client import AsyncClient
from tokenwire.config_sources import load_settings
from tokenwire.rpc.server import transport_options
from tokenwire.security.guard import Guard
from tokenwire.security.principal import Quota
from tokenwire.v1 import inference_pb2 as pb

EXECUTE = "/tokenwire.v1.Inference/Execute"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, PING, GOAWAY = 4, 6, 7
ACK = 1


class Http2:
    """Frames by hand, for what a well-behaved client never does."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, kind: int, payload: bytes = b"", flags: int = 0) -> None:
        self.writer.write(struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + bytes(4) + payload)

    async def receive(self) -> tuple[int, int, bytes]:
        """A frame's kind, flags and payload. Raises IncompleteReadError or OSError once the server closed."""
        head = await asyncio.wait_for(self.reader.readexactly(9), 20)
        length = int.from_bytes(head[:3], "big")
        return head[3], head[4], await asyncio.wait_for(self.reader.readexactly(length), 20)

    async def until(self, kind: int, *, answer_pings: bool = True) -> bytes:
        while True:
            got, flags, payload = await self.receive()
            if got == kind and not flags & ACK:
                return payload
            if got == PING and not flags & ACK and answer_pings:
                self.send(PING, payload, ACK)
            elif got == SETTINGS and not flags & ACK:
                self.send(SETTINGS, flags=ACK)

    async def closed(self) -> None:
        """Reads until the server closes, and answers nothing."""
        try:
            while True:
                await self.receive()
        except (asyncio.IncompleteReadError, ConnectionError):
            return


@asynccontextmanager
async def http2(port: int) -> AsyncIterator[Http2]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(PREFACE)
    connection = Http2(reader, writer)
    connection.send(SETTINGS)
    try:
        yield connection
    finally:
        writer.close()


async def worker_with(start_worker: Any, **settings: Any) -> Any:
    return await start_worker(settings=load_settings(settings, environ={}))


def test_every_setting_of_the_table_is_set_and_no_default_is_trusted() -> None:
    """The table of transport settings: a value that the library would choose for itself is a value that can change."""
    options = dict(transport_options(load_settings(environ={})))
    assert options == {
        "grpc.so_reuseport": 0,
        "grpc.max_receive_message_length": 4 * 2**20,
        "grpc.max_concurrent_streams": 100,
        "grpc.max_allowed_incoming_connections": 512,
        "grpc.max_metadata_size": 8192,
        "grpc.absolute_max_metadata_size": 16384,
        "grpc.keepalive_time_ms": 30_000,
        "grpc.keepalive_timeout_ms": 10_000,
        "grpc.http2.ping_timeout_ms": 10_000,
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.http2.min_ping_interval_without_data_ms": 10_000,
        "grpc.http2.max_ping_strikes": 2,
        "grpc.max_connection_idle_ms": 300_000,
        "grpc.max_connection_age_ms": 1_800_000,
        "grpc.max_connection_age_grace_ms": 310_000,
        "grpc.server_handshake_timeout_ms": 10_000,
    }


async def test_the_server_tells_its_bounds_at_once(start_worker: Any) -> None:
    worker = await worker_with(start_worker, max_concurrent_streams=7, max_metadata_bytes=2048)
    async with http2(worker.port) as connection:
        payload = await connection.until(SETTINGS)
    told = dict(struct.iter_unpack(">HI", payload))
    assert told[3] == 7  # MAX_CONCURRENT_STREAMS
    assert told[6] in (2048, 4096)  # MAX_HEADER_LIST_SIZE


async def test_streams_beyond_the_bound_wait_and_are_not_lost(start_worker: Any) -> None:
    """What is beyond the bound waits in the client, or is refused before it began, and is sent again."""
    worker = await worker_with(start_worker, max_concurrent_streams=2)
    async with AsyncClient(worker.target, timeout_s=60) as client:
        answers = [asyncio.ensure_future(client.generate("Hello")) for _ in range(6)]
        for _ in range(2):
            await worker.submitted()
        await asyncio.sleep(0.2)
        assert len(worker.fake.jobs) == 2
        worker.fake.eager = True
        worker.fake.step(3)
        assert [answer.text for answer in await asyncio.gather(*answers)] == ["Hello world!"] * 6
    assert len(worker.fake.jobs) == 6


async def test_a_second_server_cannot_share_the_port(start_worker: Any) -> None:
    worker = await worker_with(start_worker)
    server = grpc.aio.server(options=transport_options(load_settings(environ={})))
    with pytest.raises(RuntimeError, match="bind"):
        server.add_insecure_port(f"127.0.0.1:{worker.port}")


async def test_connections_beyond_the_bound_are_closed_and_the_others_work(
    start_worker: Any, request_of: Callable[..., pb.ExecuteRequest]
) -> None:
    worker = await worker_with(start_worker, max_connections=2)
    worker.fake.eager = True
    call = worker.stub.Execute(request_of())
    while await call.read() is not grpc.aio.EOF:
        pass
    async with http2(worker.port) as second:
        await second.until(SETTINGS)
        async with http2(worker.port) as third:
            await third.closed()
        await worker.stub.Health(pb.HealthRequest(), timeout=20)


async def test_p8_a_silent_connection_is_pinged_and_then_closed(start_worker: Any) -> None:
    """P8: a client whose network is gone is noticed within keepalive time plus time-out."""
    worker = await worker_with(start_worker, keepalive_time_ms=1000, keepalive_timeout_ms=500)
    async with http2(worker.port) as answers, http2(worker.port) as silent:
        loop = asyncio.get_running_loop()
        began = loop.time()
        await answers.until(PING)
        assert loop.time() - began < 5
        await silent.closed()
        assert loop.time() - began < 10


async def test_a_flood_of_pings_is_cut_off(start_worker: Any) -> None:
    worker = await worker_with(start_worker)
    async with http2(worker.port) as connection:
        await connection.until(SETTINGS)
        connection.writer.write((b"\x00\x00\x08\x06" + bytes(5 + 8)) * 20)
        payload = await connection.until(GOAWAY)
    error = int.from_bytes(payload[4:8], "big")
    assert (error, payload[8:]) == (11, b"too_many_pings")


@pytest.mark.parametrize(
    ("setting", "said"), [("max_connection_idle_ms", b"connection idle"), ("max_connection_age_ms", b"max_age")]
)
async def test_an_idle_or_old_connection_is_told_to_go(start_worker: Any, setting: str, said: bytes) -> None:
    worker = await worker_with(start_worker, **{setting: 1000})
    async with http2(worker.port) as connection:
        payload = await connection.until(GOAWAY)
    assert payload[8:] == said


async def test_a_stream_on_an_old_connection_ends_in_peace(
    start_worker: Any, request_of: Callable[..., pb.ExecuteRequest]
) -> None:
    worker = await worker_with(start_worker, max_connection_age_ms=1000)
    call = worker.stub.Execute(request_of(), timeout=20)
    assert (await call.read()).HasField("started")
    await asyncio.sleep(2.5)
    worker.fake.step(3)
    events = []
    while (event := await call.read()) is not grpc.aio.EOF:
        events.append(event.WhichOneof("event"))
    assert events[-1] == "end"


async def test_a_connection_that_says_nothing_is_closed(start_worker: Any) -> None:
    worker = await worker_with(start_worker, handshake_timeout_ms=500)
    reader, writer = await asyncio.open_connection("127.0.0.1", worker.port)
    loop = asyncio.get_running_loop()
    began = loop.time()
    while await asyncio.wait_for(reader.read(100), 20):
        pass  # its SETTINGS, and then the end
    assert loop.time() - began < 10
    writer.close()


def headers_frame(stream: int, method: str) -> bytes:
    """HEADERS of a gRPC call, each field as a literal that no table remembers."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": method,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    block = b"".join(
        b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in fields.items()
    )
    return len(block).to_bytes(3, "big") + bytes([1, 4]) + stream.to_bytes(4, "big") + block


def reset_frame(stream: int) -> bytes:
    return b"\x00\x00\x04\x03\x00" + stream.to_bytes(4, "big") + (8).to_bytes(4, "big")


async def test_streams_that_are_reset_at_once_cost_nothing_lasting(
    start_worker: Any, request_of: Callable[..., pb.ExecuteRequest]
) -> None:
    """CVE-2023-44487: 20,000 streams opened and reset; a stream beside them goes on, and nothing is left behind."""
    guard = Guard()
    worker = await start_worker(guard=guard)
    beside = worker.stub.Execute(request_of("beside"), timeout=60)
    assert (await beside.read()).HasField("started")
    resident = psutil.Process().memory_info().rss
    for _ in range(20):
        async with http2(worker.port) as connection:
            await connection.until(SETTINGS)
            connection.send(SETTINGS, flags=ACK)
            frames = [headers_frame(n, EXECUTE) + reset_frame(n) for n in range(1, 2001, 2)]
            try:
                for start in range(0, len(frames), 50):
                    connection.writer.write(b"".join(frames[start : start + 50]))
                    await connection.writer.drain()
            except ConnectionError:
                pass  # the server had enough of this connection
        await worker.stub.Health(pb.HealthRequest(), timeout=20)
    worker.fake.step(3)
    events = []
    while (event := await beside.read()) is not grpc.aio.EOF:
        events.append(event.WhichOneof("event"))
    assert events[-1] == "end"
    for _ in range(400):
        if guard.num_open == 0:
            break
        await asyncio.sleep(0.01)
    assert guard.num_open == 0
    assert len(worker.fake.jobs) == 1
    assert psutil.Process().memory_info().rss - resident < 64 * 2**20


async def test_r10_a_call_without_a_message_holds_no_place(
    start_worker: Any, request_of: Callable[..., pb.ExecuteRequest]
) -> None:
    """R10: half-closed with nothing sent. It may last to its deadline, but counts as no request meanwhile."""
    guard = Guard(each=Quota(concurrent_requests=1, requests_per_minute=2))
    worker = await start_worker(guard=guard)
    worker.fake.eager = True
    empty = worker.channel.stream_stream(EXECUTE, None, None)(timeout=2)
    await empty.done_writing()
    await asyncio.sleep(0.1)
    assert guard.num_open == 0
    assert [event.WhichOneof("event") async for event in worker.stub.Execute(request_of())][-1] == "end"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await empty.read()
    assert caught.value.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
    assert len(worker.fake.jobs) == 1


async def test_r11_of_two_messages_the_first_counts(
    start_worker: Any, request_of: Callable[..., pb.ExecuteRequest]
) -> None:
    """R11: the second is not looked at, and takes no second place."""
    worker = await start_worker(guard=Guard(each=Quota(requests_per_minute=1)))
    worker.fake.eager = True
    call = worker.channel.stream_stream(EXECUTE, pb.ExecuteRequest.SerializeToString, pb.ExecuteEvent.FromString)(
        timeout=20
    )
    await call.write(request_of("first"))
    await call.write(request_of("second"))
    await call.done_writing()
    events = [event async for event in call]
    assert events[0].started.job_id == "first"
    assert events[-1].HasField("end")
    assert [job.spec["job_id"] for job in worker.fake.jobs] == ["first"]
