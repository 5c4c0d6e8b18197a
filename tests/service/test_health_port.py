"""The health port: the same answers as the main port's, from a thread that nothing keeps waiting."""

from __future__ import annotations

import asyncio
import ctypes
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tokenwire import _native
from tokenwire.config_sources import load_settings
from tokenwire.health_port import HealthPort
from tokenwire.rpc.listen import CannotBindError
from tokenwire.rpc.state import SERVICES, Phase, WorkerState
from tokenwire.v1 import inference_pb2 as pb
from tokenwire.v1 import inference_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))

Open = Callable[..., HealthPort]


@pytest.fixture
async def open_port() -> AsyncIterator[Open]:
    """Opens health ports on a free port of the loopback address, with any settings."""
    opened = []

    def open_port(state: WorkerState, host: str = "127.0.0.1", port: int = 0, **settings: object) -> HealthPort:
        opened.append(HealthPort(load_settings(settings, environ={}), state, host, port))
        return opened[-1]

    yield open_port
    for port in opened:
        await port.close()


def question(service: str) -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=service)


async def check(stub: Any, service: str) -> int:
    return int((await stub.Check(question(service), timeout=20)).status)


async def next_status(watch: Any) -> int:
    return int((await asyncio.wait_for(watch.read(), 20)).status)


@pytest.mark.parametrize("phase", [Phase.LOADING, Phase.READY, Phase.DRAINING, Phase.FAILED])
async def test_each_phase_answers_as_the_main_port_does(start_worker: Any, open_port: Open, phase: Phase) -> None:
    worker = await start_worker(ready=phase is not Phase.LOADING)
    worker.state.enter(phase)
    port = open_port(worker.state)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port.port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in SERVICES:
            assert await check(stub, service) == await check(worker.health, service), service


async def test_a_change_is_heard_before_the_loop_does_anything_else(open_port: Open) -> None:
    state = WorkerState()
    port = open_port(state)
    with grpc.insecure_channel(f"127.0.0.1:{port.port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(question("liveness"), timeout=20).status == SERVING
        state.enter(Phase.FAILED)
        assert stub.Check(question("liveness"), timeout=20).status == NOT_SERVING


async def test_there_is_health_alone_and_what_is_wrong_is_said(open_port: Open) -> None:
    port = open_port(WorkerState())
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port.port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await inference_pb2_grpc.InferenceStub(channel).Health(pb.HealthRequest())
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        stub = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await check(stub, "nothing")
        assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.NOT_FOUND, "no such service")
        raw = channel.unary_unary("/grpc.health.v1.Health/Check")
        for wrong in (b"\x0a\x05", b"x" * 100_000):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await raw(wrong)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(question("liveness" * 100), compression=grpc.Compression.Gzip)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert await check(stub, "liveness") == SERVING


async def test_watchers_see_changes_at_once(open_port: Open) -> None:
    state = WorkerState()
    port = open_port(state)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port.port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(question("liveness")) for _ in range(50)]
        unknown = stub.Watch(question("nothing"))
        assert [await next_status(watch) for watch in watches] == [SERVING] * 50
        assert await next_status(unknown) == UNKNOWN
        watches.pop().cancel()  # one that leaves must not deafen the others
        state.enter(Phase.FAILED)
        assert [await next_status(watch) for watch in watches] == [NOT_SERVING] * 49
        await port.close()
        for watch in (*watches, unknown):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await watch.read()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_the_metrics_count_what_the_clients_count(open_port: Open) -> None:
    state = WorkerState()
    port = open_port(state)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port.port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        await asyncio.gather(*(check(stub, "readiness") for _ in range(300)))
        with pytest.raises(grpc.aio.AioRpcError):
            await check(stub, "nothing")
        watch = stub.Watch(question(""))
        await next_status(watch)
        watch.cancel()
    expected = {("Check", "OK"): 300, ("Check", "NOT_FOUND"): 1, ("Watch", "DISCONNECTED"): 1}
    give_up_at = time.monotonic() + 20
    while (counted := counts(state)) != expected:
        assert time.monotonic() < give_up_at, counted
        await asyncio.sleep(0.02)


def counts(state: WorkerState) -> dict[tuple[str, str], float]:
    families = {family.name: family for family in state.metrics.registry.collect()}
    return {
        (sample.labels["method"], sample.labels["code"]): sample.value
        for sample in families["tokenwire_request"].samples
        if sample.value
    }


def serve_natively(**limits: int) -> tuple[_native.HealthServer, int]:
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    defaults = {
        "most_streams": 100,
        "most_connections": 100,
        "most_header_bytes": 8192,
        "handshake_timeout_ms": 20_000,
        "idle_timeout_ms": 20_000,
        "stale_after_ms": 20_000,
    }
    server = _native.HealthServer(listening=[listening.detach()], services=[""], **{**defaults, **limits})
    server.publish([True])
    return server, port


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def test_checks_are_answered_while_python_can_do_nothing() -> None:
    server, port = serve_natively()
    fields = (
        (b":method", b"POST"),
        (b":path", b"/grpc.health.v1.Health/Check"),
        (b"content-type", b"application/grpc"),
    )
    headers = b"".join(bytes((0, len(name))) + name + bytes((len(value),)) + value for name, value in fields)
    sleep_with_lock = ctypes.PyDLL(None).usleep
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(PREFACE + SETTINGS)
        for stream in range(1, 21, 2):
            connection.sendall(frame(1, 4, stream, headers) + frame(0, 1, stream, bytes(5)))
            sleep_with_lock(300_000)
            assert frame(0, 0, stream, bytes((0, 0, 0, 0, 2, 8, SERVING))) in connection.recv(4096, socket.MSG_DONTWAIT)
    server.stop()


def test_what_was_published_too_long_ago_is_not_believed() -> None:
    server, port = serve_natively(stale_after_ms=4000)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(question(""), timeout=20)
        began = time.monotonic()
        assert [next(watch).status, next(watch).status] == [SERVING, NOT_SERVING]
        assert time.monotonic() - began > 0.5
        assert stub.Check(question(""), timeout=20).status == NOT_SERVING
        server.publish([True])
        assert next(watch).status == SERVING
    server.stop()


def closed_within(connection: socket.socket, seconds: float) -> bool:
    connection.settimeout(seconds)
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


def test_connections_that_are_too_many_idle_or_no_http2_are_closed() -> None:
    server, port = serve_natively(most_connections=3, handshake_timeout_ms=500, idle_timeout_ms=1500)
    silent, idle, wrong = (socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(3))
    idle.sendall(PREFACE + SETTINGS)
    assert idle.recv(9)
    beyond = socket.create_connection(("127.0.0.1", port), timeout=20)
    assert closed_within(beyond, 20)
    wrong.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert closed_within(wrong, 20)
    began = time.monotonic()
    assert closed_within(silent, 20)
    silent_s = time.monotonic() - began
    assert closed_within(idle, 20)
    assert silent_s < time.monotonic() - began
    # All places are free again.
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert health_pb2_grpc.HealthStub(channel).Check(question(""), timeout=20).status == SERVING
    for connection in (silent, idle, wrong, beyond):
        connection.close()
    server.stop()


def test_a_peer_that_does_not_read_is_not_read_and_hinders_nobody() -> None:
    server, port = serve_natively()
    deaf = socket.create_connection(("127.0.0.1", port), timeout=20)
    deaf.sendall(PREFACE + SETTINGS)
    deaf.setblocking(False)
    pings = (bytes((0, 0, 8, 6, 0, 0, 0, 0, 0)) + b"01234567") * 1000
    sent = 0
    quiet_since = time.monotonic()
    while time.monotonic() - quiet_since < 1:  # until the buffers of both sides are full
        try:
            sent += deaf.send(pings[sent % len(pings) :])
            quiet_since = time.monotonic()
        except BlockingIOError:
            time.sleep(0.01)
        assert sent < 2**28
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for _ in range(100):
            assert stub.Check(question(""), timeout=20).status == SERVING
    deaf.close()
    server.stop()


async def test_a_name_may_have_the_same_address_twice(open_port: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = socket.getaddrinfo  # as it answers where /etc/hosts names the host in two lines
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: resolve(*args, **kwargs) * 2)
    port = open_port(WorkerState(), host="localhost")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port.port}") as channel:
        assert await check(health_pb2_grpc.HealthStub(channel), "liveness") == SERVING


async def test_a_port_that_is_taken_is_said_and_every_address_of_a_name_is_served(open_port: Open) -> None:
    state = WorkerState()
    port = open_port(state, host="localhost")
    with pytest.raises(CannotBindError, match=f"cannot listen on localhost:{port.port}: Address already in use"):
        open_port(state, host="localhost", port=port.port)
    for family, _, _, _, address in socket.getaddrinfo("localhost", port.port, type=socket.SOCK_STREAM):
        host = f"[{address[0]}]" if family == socket.AF_INET6 else address[0]
        async with grpc.aio.insecure_channel(f"{host}:{port.port}") as channel:
            assert await check(health_pb2_grpc.HealthStub(channel), "liveness") == SERVING
