"""Hours of every kind of request at once: no token lost, repeated or out of order, nothing left behind.

`TOKENWIRE_SOAK_SECONDS` sets how long; by default a short turn, with `-m slow` an hour.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from e2e.helpers import Answer, Request, Transcript, only_when_asked, say
from e2e.helpers_metrics import scrape
from e2e.helpers_process import running
from tokenwire.v1 import admin_pb2, admin_pb2_grpc
from tokenwire.v1 import inference_pb2 as pb
from unit.gguf_builder import tiny_llama

SHORT_S, LONG_S = 8, 3600
STREAMS = 8
MIX = {"normal": 60, "cancel": 20, "slow": 10, "bad": 5, "deadline": 5}
NUM_REQUESTS = 40  # different ones, so that each can be compared with its answer alone
WARM_UP = 0.3
# A short turn's slope is mostly the allocator settling.
MOST_BYTES_A_REQUEST = 128
MOST_SHORT_GROWTH = 24 * 2**20


@dataclass
class Tally:
    """What the clients met."""

    sent: Counter[str] = field(default_factory=Counter)
    endings: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    resident: list[tuple[int, int]] = field(default_factory=list)  # requests so far, the worker's bytes

    @property
    def count(self) -> int:
        return sum(self.sent.values())

    def slope(self) -> float:
        """Bytes a request, after the first part."""
        late = self.resident[int(len(self.resident) * WARM_UP) :]
        return statistics.linear_regression(*zip(*late, strict=True))[0]


def make_request(number: int) -> Request:
    rng = random.Random(number)
    shared = tuple(3 + i % 250 for i in range(32)) if number % 2 else ()  # some find a prefix in the cache
    return Request(
        prompt=shared + tuple(rng.randrange(3, 259) for _ in range(rng.randint(1, 60))),
        max_tokens=rng.randint(5, 150),
        seed=number,
        temperature=rng.choice((0.0, 1.0)),
        repetition_penalty=rng.choice((1.0, 1.2)),
        logprobs=rng.choice((-1, 1)),
    )


async def read(call: Any, transcript: Transcript, pause_s: float = 0.0) -> str:
    """Reads to the end: `end`, or the code of the error event."""
    async for event in call:
        if event.HasField("error"):
            return str(event.error.code)
        transcript.add_event(event)
        if pause_s:
            await asyncio.sleep(pause_s)
    return "end"


class Client:
    """One of the streams: sends requests of the mix until time is up, and compares what it gets."""

    def __init__(self, stub: Any, number: int, expected: list[tuple[Request, Answer]], tally: Tally) -> None:
        self.stub = stub
        self.rng = random.Random(1000 + number)
        self.number = number
        self.expected = expected
        self.tally = tally

    async def run(self, until_s: float) -> None:
        kinds, weights = list(MIX), list(MIX.values())
        turn = 0
        while time.monotonic() < until_s:
            turn += 1
            kind = self.rng.choices(kinds, weights)[0]
            self.tally.sent[kind] += 1
            self.tally.endings[f"{kind}: {await self.send(kind, f'soak-{self.number}-{turn}')}"] += 1

    async def send(self, kind: str, job_id: str) -> str:
        request, answer = self.rng.choice(self.expected)
        if kind == "bad":
            bad = request.message("no such id!")
            bad.temperature = 9
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await self.stub.Execute(bad).read()
            return str(caught.value.code().name)
        timeout_s = self.rng.uniform(0.002, 0.02) if kind == "deadline" else 60
        call = self.stub.Execute(request.message(job_id), timeout=timeout_s)
        transcript = Transcript()
        cancelling = asyncio.ensure_future(self._cancel(job_id)) if kind == "cancel" else None
        status = grpc.StatusCode.OK
        ending = ""
        try:
            ending = await read(call, transcript, 0.01 if kind == "slow" else 0.0)
            status = await call.code()
        except grpc.aio.AioRpcError as error:
            status = error.code()
        if cancelling is not None:
            await cancelling
        self.tally.tokens += transcript.num_tokens
        # What came is the beginning of the right answer, whatever ended it; `Transcript` held it to its order.
        assert answer.ids[: transcript.num_tokens] == transcript.ids
        assert answer.text.startswith(transcript.text)
        if ending == "end" and status is grpc.StatusCode.OK:
            assert transcript.answer() == answer
            return "end"
        wanted = {"cancel": "CANCELLED", "deadline": "DEADLINE_EXCEEDED"}
        assert status.name == wanted.get(kind), f"{kind} ended with {status} {ending}"
        return status.name

    async def _cancel(self, job_id: str) -> None:
        await asyncio.sleep(self.rng.uniform(0, 0.015))
        # It may come before its job, or after its end.
        await self.stub.Cancel(pb.CancelRequest(job_id=job_id))


@pytest.mark.parametrize(
    "duration_s", [SHORT_S, pytest.param(LONG_S, marks=[pytest.mark.slow, pytest.mark.timeout(0)])]
)
async def test_nothing_is_lost_and_nothing_is_left_behind(
    duration_s: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    is_long = duration_s == LONG_S
    if is_long:
        only_when_asked(request)
        duration_s = int(os.environ.get("TOKENWIRE_SOAK_SECONDS", duration_s))
    model = Path(tiny_llama(tmp_path / "tiny.gguf", dtype="Q4_1", context=512).path)
    flags = {"metrics_port": 0, "admin_port": 0, "kv_cache_size_mb": 1, "max_tokens_out": 256}
    async with running(model, **flags) as worker:
        worker.keeps_lines = False
        ports = next(line for line in worker.lines if line["event"] == "ready")
        expected = []
        for number in range(NUM_REQUESTS):
            transcript = Transcript()
            assert await read(worker.stub.Execute(make_request(number).message(f"alone-{number}")), transcript) == "end"
            expected.append((make_request(number), transcript.answer()))

        tally = Tally()
        before = await asyncio.to_thread(scrape, ports["metrics_port"])
        until_s = time.monotonic() + duration_s
        clients = [Client(worker.stub, number, expected, tally) for number in range(STREAMS)]
        sampling = asyncio.ensure_future(_sample(worker.process.pid, tally, duration_s / 100))
        await asyncio.gather(*(client.run(until_s) for client in clients))
        sampling.cancel()
        await _settled(ports["metrics_port"])
        after = await asyncio.to_thread(scrape, ports["metrics_port"])
        async with grpc.aio.insecure_channel(f"127.0.0.1:{ports['admin_port']}") as channel:
            ledger = await admin_pb2_grpc.AdminServiceStub(channel).ListCache(admin_pb2.ListCacheRequest())
        worker.process.terminate()
        assert await worker.exit_status() == 0

    growth = tally.resident[-1][1] - tally.resident[int(len(tally.resident) * WARM_UP)][1]
    say(
        f"{duration_s} s, {tally.count} requests {dict(tally.sent)}, {tally.tokens} tokens, {dict(tally.endings)}; "
        f"resident {growth / 1024:+.0f} KiB after warm-up, {tally.slope():+.0f} bytes a request"
    )
    assert ledger.finding == ""
    assert ledger.used_blocks == 0
    assert ledger.free_blocks + ledger.cached_blocks == ledger.total_blocks
    executes = [name for name in after if name.startswith("tokenwire_request_total") and 'method="Execute"' in name]
    counted = sum(after[name] - before[name] for name in executes)
    # A deadline can pass before the call reaches the worker.
    assert tally.count - tally.endings["deadline: DEADLINE_EXCEEDED"] <= counted <= tally.count
    assert tally.endings["normal: end"] == tally.sent["normal"]
    assert tally.endings["slow: end"] == tally.sent["slow"]
    assert tally.endings["bad: INVALID_ARGUMENT"] == tally.sent["bad"]
    assert tally.endings["cancel: CANCELLED"] > 0
    if is_long:
        assert tally.slope() <= MOST_BYTES_A_REQUEST
    else:
        assert growth <= MOST_SHORT_GROWTH


async def _sample(pid: int, tally: Tally, interval_s: float) -> None:
    process = psutil.Process(pid)
    while True:
        tally.resident.append((tally.count, process.memory_info().rss))
        await asyncio.sleep(interval_s)


async def _settled(port: int) -> None:
    """Waits until the engine holds nothing any more: a client that left is noticed a moment later."""
    give_up_at = time.monotonic() + 30
    while True:
        page = await asyncio.to_thread(scrape, port)
        if page["tokenwire_requests_active"] == page["tokenwire_request_queue_depth"] == 0:
            return
        assert time.monotonic() < give_up_at
        await asyncio.sleep(0.02)
