"""A real gRPC server on localhost over an engine whose every step the test takes by hand."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2_grpc

from service.helpers_attach import WORDS
from service.helpers_security import Keys
from service.worker_process import worker_processes
from tokenwire.config import Settings
from tokenwire.config_sources import load_settings
from tokenwire.engine import AsyncEngine
from tokenwire.engine.fake import FakeEngine, FakeJob
from tokenwire.gateway.pool import WorkerPool
from tokenwire.gateway.server import GatewayServer
from tokenwire.rpc.server import build_server
from tokenwire.rpc.state import ModelFacts, Phase, Serving, WorkerState
from tokenwire.rpc.validate import Limits
from tokenwire.security.guard import Guard
from tokenwire.security.setup import Security
from tokenwire.security.tls import CertificateSource
from tokenwire.v1 import inference_pb2 as pb
from tokenwire.v1 import inference_pb2_grpc

LIMITS = Limits(
    max_prompt_chars=32768,
    max_chat_messages=64,
    max_tokens_in=0,
    max_tokens_out=2048,
    vocab_size=1000,
    context_length=4096,
    max_token_bytes=16,
)
FACTS = ModelFacts("test-model", "Q4_1", "gguf-bpe", LIMITS.vocab_size, LIMITS.context_length, "cpu")


@dataclass
class FakeText:
    """One token a character. `gate`, when cleared, holds every call back."""

    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    threads: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.gate.set()

    def encode_prompt(self, text: str) -> list[int]:
        self.threads.add(threading.get_ident())
        self.entered.release()
        assert self.gate.wait(20)
        return [ord(c) % LIMITS.vocab_size for c in text]

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        return self.encode_prompt("".join(content for _, content in messages))

    def count_tokens(self, text: str) -> int:
        return len(text)


@dataclass
class Worker:
    """A running server, a client of it, and the guard between them."""

    fake: FakeEngine
    text: FakeText
    state: WorkerState
    engine: AsyncEngine
    server: grpc.aio.Server
    port: int
    channel: grpc.aio.Channel
    stub: Any
    health: Any
    guard: Guard | None

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def submitted(self) -> FakeJob:
        """The next job to reach the engine."""
        assert await asyncio.to_thread(self.fake.submitted.acquire, timeout=20)
        return self.fake.jobs[-1]


StartWorker = Callable[..., Any]


@pytest.fixture
async def start_worker() -> AsyncIterator[StartWorker]:
    running: list[tuple[Worker, ThreadPoolExecutor]] = []

    async def start(
        *,
        fake: FakeEngine | None = None,
        ready: bool = True,
        limits: Limits = LIMITS,
        settings: Settings | None = None,
        guard: Guard | None = None,
        listen: Callable[[grpc.aio.Server], int] | None = None,
        channel_options: Sequence[tuple[str, Any]] = (),
    ) -> Worker:
        fake = fake or FakeEngine()
        text, state, pool = FakeText(), WorkerState(model="test-model"), ThreadPoolExecutor(4)
        engine = AsyncEngine(fake, remembered_jobs=3)
        engine.attach()
        server = build_server(settings or load_settings(environ={}), state, pool, guard)
        port = listen(server) if listen is not None else server.add_insecure_port("127.0.0.1:0")
        await server.start()
        if ready:
            state.serving = Serving(engine, text, limits, FACTS)
            state.enter(Phase.READY)
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=list(channel_options))
        worker = Worker(
            fake,
            text,
            state,
            engine,
            server,
            port,
            channel,
            inference_pb2_grpc.InferenceStub(channel),
            health_pb2_grpc.HealthStub(channel),
            guard,
        )
        running.append((worker, pool))
        return worker

    yield start
    for worker, pool in running:
        worker.text.gate.set()
        await worker.channel.close()
        worker.fake.fail_all("UNAVAILABLE", "test is over")
        await worker.server.stop(None)
        assert await worker.engine.wait_idle(10), "a job outlived its stream"
        await worker.engine.close()
        worker.fake.close()
        pool.shutdown()


@pytest.fixture
async def worker(start_worker: StartWorker) -> Worker:
    started: Worker = await start_worker()
    return started


@pytest.fixture
def start_guarded(start_worker: StartWorker, keys: Keys) -> StartWorker:
    """Starts a worker that lets the callers of `keys` in; the options are its guard's."""

    async def start(**options: Any) -> Worker:
        started: Worker = await start_worker(guard=Guard(keys.path, **options))
        return started

    return start


def request(job_id: str = "job-1", **fields: Any) -> pb.ExecuteRequest:
    if not {"prompt", "prompt_tokens", "chat"} & fields.keys():
        fields["prompt"] = "Hello"
    return pb.ExecuteRequest(job_id=job_id, **fields)


@dataclass
class Gateway:
    """A running HTTP server in front of workers, and a client of it."""

    server: GatewayServer
    http: httpx.AsyncClient

    @property
    def port(self) -> int:
        return self.server.port

    async def raw(self, *parts: bytes, wait_s: float = 20) -> bytes:
        """Sends bytes as they are, one write each, and returns all that comes back until the server closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
            return await asyncio.wait_for(reader.read(), wait_s)
        finally:
            writer.close()


StartGateway = Callable[..., Any]


@pytest.fixture
async def start_gateway() -> AsyncIterator[StartGateway]:
    running: list[Gateway] = []

    async def start(
        *targets: str, ready: bool = True, security: Security | None = None, verify: Any = True, **flags: object
    ) -> Gateway:
        settings = load_settings({"http_port": 0, **flags}, environ={})
        server = GatewayServer(settings, "127.0.0.1", WorkerPool(targets), security=security)
        server.bind()
        await server.start()
        scheme = "https" if security is not None and security.certificates is not None else "http"
        base = f"{scheme}://127.0.0.1:{server.port}"
        client = httpx.AsyncClient(base_url=base, trust_env=False, timeout=20, verify=verify)
        running.append(Gateway(server, client))
        give_up_at = asyncio.get_running_loop().time() + 20
        while ready and not all(worker.ready and worker.limits for worker in server.gateway.pool.workers):
            assert asyncio.get_running_loop().time() < give_up_at
            await asyncio.sleep(0.005)
        return running[-1]

    yield start
    for gateway in running:
        await gateway.http.aclose()
        await gateway.server.stop(1)


@pytest.fixture
async def detaching(start_worker: StartWorker) -> StartWorker:
    """Starts a worker whose detached jobs follow these settings."""

    async def start(**settings: Any) -> Any:
        return await start_worker(fake=FakeEngine(WORDS), settings=load_settings(settings, environ={}))

    return start


@pytest.fixture
async def gateway(worker: Worker, start_gateway: StartGateway) -> Gateway:
    """A gateway in front of `worker`."""
    started: Gateway = await start_gateway(worker.target)
    return started


@pytest.fixture
def start_both(start_worker: StartWorker, start_gateway: StartGateway, keys: Keys) -> StartGateway:
    """Starts a worker and an HTTP port of one guard, as `serve --http-port` has them; it lets those of `keys` in."""

    async def start(
        guard: Guard | None = None, certificates: CertificateSource | None = None, *, verify: Any = True, **options: Any
    ) -> tuple[Worker, Gateway]:
        guard = guard or Guard(keys.path, **options)
        worker = await start_worker(guard=guard)
        return worker, await start_gateway(worker.target, security=Security(guard, certificates), verify=verify)

    return start


@pytest.fixture
def start_two(start_guarded: StartWorker, start_gateway: StartGateway) -> StartGateway:
    """Starts two workers that let the callers of `keys` in, and a gateway in front of them."""

    async def start() -> tuple[list[Worker], Gateway]:
        workers = [await start_guarded() for _ in range(2)]
        return workers, await start_gateway(*(worker.target for worker in workers))

    return start


@pytest.fixture(name="request_of")
def _request_of() -> Callable[..., pb.ExecuteRequest]:
    return request


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Any]]:
    """Starts worker processes: `await start(scenario of fake_worker.py, **flags)`."""
    async with worker_processes() as start_process:
        yield start_process


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    """A file without keys, so that nobody may do anything yet."""
    return Keys(tmp_path / "keys.json")
