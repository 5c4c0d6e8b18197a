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
# Between two lines of a log, and for the end of a process that was told to end.
PATIENCE_S = 90.0


class Process:
    """A process whose every line on stderr is a JSON object; they are read as they come, so that it never waits.

    Attributes:
        lines: what it logged.
        keeps_lines: unset it where a process logs more than a test wants to hold: lines are then read and dropped.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []
        self.keeps_lines = True
        self.port = 0
        self.channel: Any = None
        self.stub: Any = None
        self.health: Any = None
        self._num_seen = 0
        self._more = asyncio.Event()
        self._reading = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        try:
            while data := await self.process.stderr.readline():
                if self.keeps_lines:
                    self.lines.append(json.loads(data))
                    self._more.set()
        finally:
            self._more.set()

    async def log_line(self, event: str) -> dict[str, Any]:
        """The next line of this event, after the last one that was asked for."""
        while True:
            for line in self.lines[self._num_seen :]:
                self._num_seen += 1
                if line["event"] == event:
                    return dict(line)
            if self._reading.done():
                self._reading.result()
                raise AssertionError(f"the log ended without {event}: {self.lines}")
            self._more.clear()
            await asyncio.wait_for(self._more.wait(), PATIENCE_S)

    async def connect(self, event: str = "ready") -> None:
        self.port = (await self.log_line(event))["port"]
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{self.port}")
        self.stub = inference_pb2_grpc.InferenceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)

    async def exit_status(self) -> int:
        """Waits for the end of the log and of the process."""
        await asyncio.wait_for(asyncio.shield(self._reading), PATIENCE_S)
        return await asyncio.wait_for(self.process.wait(), PATIENCE_S)

    def events(self) -> list[str]:
        return [line["event"] for line in self.lines]

    async def close(self) -> None:
        """Kills it, if it still runs. Raises what was wrong with its log."""
        done = [self._reading] if self._reading.done() else []  # what is killed may leave half a line behind
        if self.channel is not None:
            await self.channel.close()
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        self._reading.cancel()
        await asyncio.wait([self._reading])
        for reading in done:
            reading.result()


async def spawn(*command: str | Path) -> Process:
    return Process(await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE, limit=2**20))


@asynccontextmanager
async def worker_processes() -> AsyncIterator[Callable[..., Awaitable[Process]]]:
    """Yields what starts a process; those that still run at the end are killed."""
    running: list[Process] = []

    async def run(scenario: str, **flags: object) -> Process:
        running.append(await spawn(sys.executable, SCRIPT, scenario, json.dumps(flags)))
        return running[-1]

    try:
        yield run
    finally:
        await asyncio.gather(*(worker.close() for worker in running))


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
