"""A worker as a process of its own, its log and a client of it; the fixture `start` of conftest.py makes them."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from tokenwire.v1 import inference_pb2 as pb
from tokenwire.v1 import inference_pb2_grpc

SCRIPT = Path(__file__).with_name("fake_worker.py")


class Process:
    """A worker process; every line it logs must be JSON."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []
        self.port = 0
        self.channel: Any = None
        self.stub: Any = None
        self.health: Any = None

    async def log_line(self, event: str) -> dict[str, Any]:
        """Reads the log up to the next line of this event."""
        assert self.process.stderr is not None
        while data := await asyncio.wait_for(self.process.stderr.readline(), 90):
            line = json.loads(data)
            self.lines.append(line)
            if line["event"] == event:
                return dict(line)
        raise AssertionError(f"the log ended without {event}: {self.lines}")

    async def connect(self, event: str = "ready") -> None:
        self.port = (await self.log_line(event))["port"]
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{self.port}")
        self.stub = inference_pb2_grpc.InferenceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)

    async def exit_status(self) -> int:
        assert self.process.stderr is not None
        while data := await asyncio.wait_for(self.process.stderr.readline(), 90):
            self.lines.append(json.loads(data))
        return await asyncio.wait_for(self.process.wait(), 90)

    def events(self) -> list[str]:
        return [line["event"] for line in self.lines]


@asynccontextmanager
async def worker_processes() -> AsyncIterator[Callable[..., Awaitable[Process]]]:
    """Yields what starts a process; those that still run at the end are killed."""
    running: list[Process] = []

    async def run(scenario: str, **flags: object) -> Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable, SCRIPT, scenario, json.dumps(flags), stderr=asyncio.subprocess.PIPE
        )
        running.append(Process(process))
        return running[-1]

    yield run
    for worker in running:
        if worker.channel is not None:
            await worker.channel.close()
        if worker.process.returncode is None:
            worker.process.kill()
            await worker.process.wait()


async def next_event(call: Any) -> Any:
    event = await asyncio.wait_for(call.read(), 20)
    assert event is not grpc.aio.EOF
    return event


async def rest(call: Any) -> list[pb.ExecuteEvent]:
    """The events up to the end of the stream, however it ends."""
    events = []
    try:
        while (event := await asyncio.wait_for(call.read(), 20)) is not grpc.aio.EOF:
            events.append(event)
    except grpc.aio.AioRpcError:
        assert events, "refused"
    return events


def kinds(events: list[pb.ExecuteEvent]) -> list[str]:
    return [event.WhichOneof("event") for event in events]
