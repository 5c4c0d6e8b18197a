"""Clients that leave in every way there is: afterwards no job, no block and no kept event is left."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from breaking_proxy import breaking_proxy
from e2e.helpers import only_when_asked, say, settle
from e2e.helpers_service import Service, serving
from tokenwire.v1 import inference_pb2 as pb
from tokenwire.v1 import inference_pb2_grpc
from unit.gguf_builder import tiny_llama

GRACE_S = 0.3
NUM_CHANNELS = 4
AT_ONCE = 48
WAYS = ("read", "cancel", "leave", "deadline", "detach and leave", "detach and cancel", "detach and attach", "cut")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "deep.gguf"
    return tiny_llama(path, dtype="Q4_1", context=640, n_layers=8, n_embd=256, n_ff=512).path


@dataclass
class Visitor:
    """A client that runs one job and leaves in one of the ways."""

    stub: Any
    rng: random.Random
    job_id: str

    def request(self, **fields: Any) -> pb.ExecuteRequest:
        rng = self.rng
        prompt = pb.TokenIds(ids=[rng.randrange(3, 200) for _ in range(rng.choice((1, 8, 30, 120)))])
        return pb.ExecuteRequest(
            job_id=self.job_id, prompt_tokens=prompt, max_tokens=rng.choice((1, 20, 60, 200)), seed=1, **fields
        )

    async def read(self, call: Any, most: int | None = None) -> str:
        """Reads some events, or all; the status if the stream ended."""
        with contextlib.suppress(grpc.aio.AioRpcError):
            while most is None or most > 0:
                most = None if most is None else most - 1
                if await call.read() is grpc.aio.EOF:
                    break
            else:
                return "open"
        return str((await call.code()).name)

    async def cancel(self) -> None:
        await self.stub.Cancel(pb.CancelRequest(job_id=self.job_id))

    async def visit(self, way: str) -> str:
        reads = self.rng.choice((0, 0, 1, 2, 5, 30))
        if way == "deadline":
            return await self.read(self.stub.Execute(self.request(), timeout=self.rng.uniform(0.001, 0.2)))
        fields: dict[str, Any] = {"detach": True, "attach_token": "t" * 16} if way.startswith("detach") else {}
        call = self.stub.Execute(self.request(**fields))
        if way == "read":
            return await self.read(call)
        ended = await self.read(call, reads)
        if way.endswith("cancel"):
            await self.cancel()
            return await self.read(call)
        call.cancel()
        if way == "detach and attach" and reads > 0 and ended == "open":
            again = self.stub.Attach(pb.AttachRequest(job_id=self.job_id, attach_token="t" * 16))
            return f"attached: {await self.read(again)}"
        return "left"

    async def visit_through(self, service: Service) -> str:
        """Loses the connection."""
        async with (
            breaking_proxy(service.port, [self.rng.randint(0, 2000)]) as proxy,
            grpc.aio.insecure_channel(proxy.target, [("grpc.use_local_subchannel_pool", 1)]) as channel,
        ):
            stub = inference_pb2_grpc.InferenceStub(channel)
            return await self.read(stub.Execute(self.request(detach=self.rng.random() < 0.5)))


async def storm(path: Path, count: int) -> None:
    rng = random.Random(count)
    outcomes: Counter[str] = Counter()
    settings = {"resume_grace_seconds": GRACE_S}
    async with serving(path, settings, kv_blocks=120, num_threads=2, max_batch_tokens=64) as service:
        async with contextlib.AsyncExitStack() as stack:
            options = [("grpc.use_local_subchannel_pool", 1)]
            stubs = [
                inference_pb2_grpc.InferenceStub(
                    await stack.enter_async_context(
                        grpc.aio.insecure_channel(f"127.0.0.1:{service.port}", options=options)
                    )
                )
                for _ in range(NUM_CHANNELS)
            ]
            places = asyncio.Semaphore(AT_ONCE)

            async def visit(number: int) -> None:
                async with places:
                    way = rng.choice(WAYS)
                    visitor = Visitor(rng.choice(stubs), random.Random(rng.random()), f"job-{number}")
                    outcome = await (visitor.visit_through(service) if way == "cut" else visitor.visit(way))
                    outcomes[f"{way}: {outcome}"] += 1

            await asyncio.gather(*(visit(number) for number in range(count)))
        # Jobs that were left detached run until nobody came back for them.
        assert await service.engine.wait_idle(60)
        stats = settle(service.native)
        assert (stats.active_jobs, stats.queued_jobs, stats.used_blocks) == (0, 0, 0)
        assert stats.free_blocks + stats.cached_blocks == stats.total_blocks == 120
    left = sum(number for outcome, number in outcomes.items() if not outcome.endswith(": OK"))
    say(f"{count} jobs, {left} left or cancelled; free + cached = total afterwards: {dict(sorted(outcomes.items()))}")
    assert left > count // 2
    for outcome in ("read: OK", "cancel: CANCELLED", "detach and cancel: CANCELLED", "detach and attach: attached: OK"):
        assert outcomes[outcome] > 0
    assert outcomes["deadline: DEADLINE_EXCEEDED"] > 0
    assert outcomes["cut: UNAVAILABLE"] > 0


@pytest.mark.timeout(240)
async def test_a_storm_of_cancels_and_disconnects_leaves_the_ledger_exact(deep: Path) -> None:
    await storm(deep, 400)


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_very_many_cancels_and_disconnects_leave_the_ledger_exact(
    deep: Path, request: pytest.FixtureRequest
) -> None:
    only_when_asked(request)
    await storm(deep, 7500)  # two thirds of them leave, which makes more than 5,000
