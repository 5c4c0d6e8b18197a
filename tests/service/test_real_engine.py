"""The whole service over the compiled engine and a real model: what a fake engine cannot prove."""

from __future__ import annotations

import asyncio
import hashlib
import random
import struct
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from tokenwire.config_sources import load_settings
from tokenwire.engine import AsyncEngine
from tokenwire.engine.grammars import Grammars
from tokenwire.engine.load import LoadedModel, load_model
from tokenwire.models import resolve
from tokenwire.rpc.server import build_server
from tokenwire.rpc.state import ModelFacts, Phase, Serving, WorkerState
from tokenwire.rpc.validate import Limits
from tokenwire.security.admission import Admission
from tokenwire.security.principal import Principal, Scope
from tokenwire.v1 import inference_pb2 as pb
from tokenwire.v1 import inference_pb2_grpc

TEXT = "The rain had stopped an hour before, and the street still shone under the lamps. "


class RealWorker:
    """A server over a loaded model, and a client of it."""

    def __init__(self, model: LoadedModel, engine: AsyncEngine, channel: grpc.aio.Channel) -> None:
        self.native: Any = model.native
        self.engine = engine
        self.stub = inference_pb2_grpc.InferenceStub(channel)

    async def assert_idle_and_balanced(self) -> None:
        """Every job is gone, and every block is free or cached."""
        assert await self.engine.wait_idle(30)
        # The engine drops a cancelled job between two steps, and each audit waits for such a moment.
        for _ in range(20):
            assert await asyncio.to_thread(self.native.audit) == ""
            stats = self.native.stats()
            if stats.active_jobs == 0:
                break
        assert (stats.active_jobs, stats.queued_jobs, stats.used_blocks) == (0, 0, 0)
        assert stats.free_blocks + stats.cached_blocks == stats.total_blocks


@pytest.fixture(scope="module")
def device() -> str:
    """Where the model computes; tests/gpu runs this file's tests with another."""
    return "cpu"


@pytest.fixture(scope="module")
def model(device: str) -> Any:
    path = resolve("smollm2", fetch=True)
    flags = {"model": str(path), "device": device, "num_threads": 2, "max_context_tokens": 2048}
    settings = load_settings(flags, environ={})
    loaded = load_model(settings, lambda percent: None)
    yield loaded
    loaded.native.stop()
    loaded.text.close()


@pytest.fixture
async def real(model: LoadedModel) -> AsyncIterator[RealWorker]:
    engine = AsyncEngine(model.native)
    engine.attach()
    limits = Limits(32768, 64, 0, 2048, model.vocab_size, model.context_length, model.max_token_bytes)
    facts = ModelFacts(
        model.name, model.quant_kind, model.tokenizer_kind, model.vocab_size, model.context_length, model.device
    )
    grammars = Grammars(model.grammar_compiler, timeout_s=30, max_entries=4) if model.grammar_compiler else None
    state = WorkerState(serving=Serving(engine, model.text, limits, facts, grammars), phase=Phase.READY)
    with ThreadPoolExecutor(2) as pool:
        server = build_server(load_settings(environ={}), state, pool)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            worker = RealWorker(model, engine, channel)
            yield worker
        await server.stop(None)
        await worker.assert_idle_and_balanced()
    if grammars is not None:
        grammars.close()
    asyncio.get_running_loop().remove_reader(model.native.event_fd)


async def generate(real: RealWorker, job_id: str, **fields: Any) -> list[pb.ExecuteEvent]:
    """All events of a job that must complete."""
    fields.setdefault("prompt", TEXT)
    events, code = await rest(real.stub.Execute(pb.ExecuteRequest(job_id=job_id, **fields)))
    assert code is grpc.StatusCode.OK
    return events


async def rest(call: Any) -> tuple[list[pb.ExecuteEvent], grpc.StatusCode]:
    """What is left of a stream, and the status it ends with."""
    events = []
    try:
        while (event := await call.read()) is not grpc.aio.EOF:
            events.append(event)
    except grpc.aio.AioRpcError as error:
        return events, error.code()
    return events, await call.code()


def ids_of(events: list[pb.ExecuteEvent]) -> list[int]:
    return [token_id for event in events for token_id in event.token.ids]


def text_of(events: list[pb.ExecuteEvent]) -> str:
    return "".join(event.token.t for event in events)


async def test_the_stream_is_whole_ordered_and_accounted_for(real: RealWorker) -> None:
    events = await generate(real, "a", max_tokens=24, temperature=0)
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["started", *["token"] * (len(kinds) - 3), "metrics", "end"]
    index = 0
    for event in events[1:-2]:
        assert event.token.i == index
        index += len(event.token.ids)
    end, metrics = events[-1].end, events[-2].metrics
    assert end.tokens_out == metrics.tokens_out == index
    assert metrics.tokens_in == events[0].started.prompt_tokens > 10
    digest = hashlib.sha256(b"".join(struct.pack("<I", token_id) for token_id in ids_of(events)))
    assert end.digest == digest.hexdigest()
    assert len(text_of(events)) > 20


async def test_a_prompt_is_cached_for_its_tenant_alone(real: RealWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can tell by time or count whether another tenant sent a prompt; the bytes are the same for all."""
    tenant = "acme"

    def admission() -> Admission:
        return Admission(Principal(f"key:{tenant}", tenant, frozenset(Scope)), None, lambda _: None)

    monkeypatch.setattr("tokenwire.rpc.inference.current_admission", admission)
    secret: dict[str, Any] = {"prompt": TEXT * 6, "max_tokens": 4, "temperature": 0}
    first = await generate(real, "a", **secret)
    again = await generate(real, "b", **secret)
    assert again[0].started.cached_tokens > 64
    for tenant in ("globex", "key:acme"):
        for salt in (None, "acme", "tokenwire tenant 4 acme"):
            other = await generate(real, f"{tenant}-{salt}".replace(" ", "."), **secret, cache_salt=salt)
            assert other[0].started.cached_tokens == 0
            assert ids_of(other) == ids_of(first)
    tenant = "acme"
    assert (await generate(real, "c", **secret))[0].started.cached_tokens > 64


@pytest.mark.parametrize("temperature", [0.0, 0.7])
async def test_neighbours_do_not_change_my_bytes(real: RealWorker, temperature: float) -> None:
    mine: dict[str, Any] = {"max_tokens": 16, "temperature": temperature, "seed": 11}
    alone = ids_of(await generate(real, "alone", **mine))
    others = [generate(real, f"other-{n}", prompt=TEXT * (n + 1), max_tokens=12, seed=n) for n in range(6)]
    together, *_ = await asyncio.gather(generate(real, "together", **mine), *others)
    assert ids_of(together) == alone
    assert len(alone) == 16


async def test_a_chat_is_answered_and_stops_by_itself_or_by_count(real: RealWorker) -> None:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="What is the capital of France?")])
    events = await generate(real, "a", chat=chat, prompt=None, max_tokens=40, temperature=0)
    assert "Paris" in text_of(events)


async def test_a_stop_string_ends_the_text_before_it(real: RealWorker) -> None:
    full = text_of(await generate(real, "full", max_tokens=24, temperature=0))
    stop = full[10:16]
    events = await generate(real, "cut", max_tokens=24, temperature=0, stop=[stop])
    assert text_of(events) == full[: full.index(stop)]
    assert (events[-1].end.stop_reason, events[-1].end.stop_sequence) == (pb.STOP_REASON_STOP_SEQUENCE, stop)


async def test_a_salt_keeps_prompts_apart_and_changes_no_byte(real: RealWorker) -> None:
    async def cached(job_id: str, **fields: Any) -> int:
        events = await generate(
            real, job_id, prompt="Salt and pepper. " + TEXT * 8, max_tokens=8, temperature=0, **fields
        )
        texts.add(text_of(events))
        return events[0].started.cached_tokens

    texts: set[str] = set()
    assert await cached("first", cache_salt="one") == 0
    assert await cached("same", cache_salt="one") > 64
    assert await cached("other", cache_salt="two") == 0
    assert await cached("none") == 0
    assert len(texts) == 1


async def test_cancel_in_prefill_and_in_decode_frees_everything(real: RealWorker) -> None:
    for prompt, reads in ((TEXT * 90, 0), (TEXT, 4)):
        call = real.stub.Execute(pb.ExecuteRequest(job_id="a", prompt=prompt, max_tokens=100, temperature=0))
        for _ in range(reads):
            await call.read()
        while (response := await real.stub.Cancel(pb.CancelRequest(job_id="a"))).outcome == (
            pb.CancelResponse.OUTCOME_NOT_FOUND
        ):
            pass  # the call is still on its way
        assert response.outcome == pb.CancelResponse.OUTCOME_CANCELLED
        events, code = await rest(call)
        assert code is grpc.StatusCode.CANCELLED
        assert events[-1].error.code == "CANCELLED"
        await real.assert_idle_and_balanced()


@pytest.mark.parametrize("prompt", [TEXT, TEXT * 90], ids=["decode", "prefill"])
async def test_a_deadline_stops_the_job_in_the_engine(real: RealWorker, prompt: str) -> None:
    call = real.stub.Execute(pb.ExecuteRequest(job_id="a", prompt=prompt, temperature=0), timeout=0.4)
    _, code = await rest(call)
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    await real.assert_idle_and_balanced()


async def test_a_storm_of_cancels_and_disconnects_leaks_nothing(real: RealWorker, device: str) -> None:
    rng = random.Random(1)
    max_tokens = 12 if device == "cpu" else 400  # long enough for a cancel to meet a live job

    async def client(n: int) -> str:
        call = real.stub.Execute(
            pb.ExecuteRequest(job_id=f"job-{n}", prompt=TEXT * rng.randint(1, 4), max_tokens=max_tokens, seed=n)
        )
        way, reads = rng.choice(["read", "cancel", "leave"]), rng.randint(0, 4)
        for _ in range(reads):
            assert await call.read() is not grpc.aio.EOF
        if way == "leave":
            call.cancel()
            return way
        if way == "cancel":
            await real.stub.Cancel(pb.CancelRequest(job_id=f"job-{n}"))
        return (await rest(call))[1].name

    outcomes = await asyncio.gather(*(client(n) for n in range(60)))
    assert set(outcomes) == {"leave", "CANCELLED", "OK"}
    await real.assert_idle_and_balanced()
