"""Thousands of requests with hostile ids, metadata and bytes: no new metric series, and no line that is not one (A-3,
A-4). By default a tenth of them; `-m slow` sends 10,000."""

from __future__ import annotations

import asyncio
import random

import grpc
import pytest

from e2e.helpers import only_when_asked, say
from e2e.helpers_metrics import scrape
from service.worker_process import Process, worker_processes
from tokenwire.v1 import inference_pb2 as pb

PARALLEL = 50
EVENT = '{"event": "ready", "level": "error"}'
FRAGMENTS = (
    "\n",
    "\r\n",
    "\x1b[31m",
    "\x00",
    "\u2028",
    "\u202e",
    '"}',
    "\\",
    "{{",
    "%s",
    "{}",
    EVENT,
    "tokenwire_",
    "a" * 200,
)
METADATA = ("x-correlation-id", "x-request-id", "traceparent", "user-agent-x", "x-hostile")


def hostile(rng: random.Random) -> str:
    return "".join(rng.choice(FRAGMENTS) for _ in range(rng.randint(1, 6))) + str(rng.getrandbits(64))


def printable(text: str) -> str:
    """What a metadata value may hold at all."""
    return "".join(c for c in text if " " <= c <= "~") or "-"


async def send(worker: Process, rng: random.Random, number: int) -> None:
    """One request that names things as an attacker would; most are refused, some run."""
    metadata = tuple((key, printable(hostile(rng))) for key in rng.sample(METADATA, 2))
    kind = number % 4
    if kind == 0:
        call = worker.stub.Execute(pb.ExecuteRequest(job_id=hostile(rng), prompt="x"), metadata=metadata)
    elif kind == 1:
        call = worker.stub.Execute(pb.ExecuteRequest(job_id=f"j{number}", prompt=hostile(rng)), metadata=metadata)
    elif kind == 2:
        method = rng.choice(
            ("Execute", "Nothing\x7f", hostile(rng).encode("ascii", "ignore").decode().replace("/", ""))
        )
        path = "/tokenwire.v1.Inference/" + printable(method)
        call = worker.channel.unary_stream(path, None, None)(rng.randbytes(rng.randint(0, 40)), metadata=metadata)
    else:
        request = pb.CancelRequest(job_id=hostile(rng))
        call = worker.channel.unary_stream("/tokenwire.v1.Inference/Cancel", pb.CancelRequest.SerializeToString, None)(
            request, metadata=metadata
        )
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError:
        pass  # how each is refused has its own tests


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
async def test_hostile_names_add_no_series_and_break_no_line(count: int, request: pytest.FixtureRequest) -> None:
    if count > 1000:
        only_when_asked(request)
    async with worker_processes() as start:
        worker = await start("eager", metrics_port=0)
        await worker.connect()
        (ready,) = (line for line in worker.lines if line["event"] == "ready")
        port = ready["metrics_port"]
        rng = random.Random(1)
        for number in range(4):  # every kind once, so that methods that are served have their series
            await send(worker, rng, number)
        await worker.stub.Cancel(pb.CancelRequest(job_id="nothing"))
        before = set(await asyncio.to_thread(scrape, port))
        for first in range(4, count, PARALLEL):
            await asyncio.gather(*(send(worker, rng, number) for number in range(first, first + PARALLEL)))
        after = await asyncio.to_thread(scrape, port)
        worker.process.terminate()
        assert await worker.exit_status() == 0
    events = worker.lines[worker.lines.index(ready) + 1 :]
    assert set(after) - before == set()
    assert all(isinstance(event, dict) and event["worker_id"] for event in events)
    counted = {
        kind: sum(event["event"] == kind for event in events) for kind in ("ready", "execute_start", "execute_end")
    }
    assert counted["ready"] == 0, "an event was forged"
    assert counted["execute_start"] == counted["execute_end"] > count / 8
    codes = {name: value for name, value in after.items() if "request_total" in name and value}
    say(str(codes))
    say(f"{count} hostile requests: {len(after)} samples before and after, {len(events)} lines, each one JSON object")
