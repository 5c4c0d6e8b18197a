"""The client against a scripted worker in this process: what it sends, reads, raises and cancels."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timezone

import grpc
import pytest
from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2

from scripted_worker import TIMEOUT_S, Worker, refuse, until_cancelled
from tokenwire.client import (
    AsyncClient,
    CancelResult,
    Client,
    End,
    Event,
    FieldViolation,
    Metrics,
    ResumePoint,
    Started,
    Token,
    TokenLogprob,
    TokenwireRpcError,
    TopLogprob,
)
from tokenwire.client.events import Generation
from tokenwire.v1 import inference_pb2 as pb

HAPPY_EVENTS: list[Event] = [
    Started("job", "m", datetime(2030, 1, 2, 3, 4, 5, tzinfo=timezone.utc), 2**64 - 1, 3, 2),
    Token("Grüße", 0, (7, 8), ()),
    Token(" 🌍", 2, (9,), (TokenLogprob(9, " 🌍", " 🌍".encode(), -0.5, (TopLogprob(10, "?", b"\xf0", -1.5),)),)),
    Metrics(3, 3, 0, 0.0, 0.0, 1.5, 0.0, 100.0),
    End(3, 20, "eos", "", "d"),
]


@pytest.fixture
def client(worker: Worker) -> Iterator[Client]:
    with Client(worker.target) as client:
        yield client


def test_events_arrive_typed_and_in_order(client: Client) -> None:
    assert list(client.execute("hello", job_id="job")) == HAPPY_EVENTS


async def test_async_events_are_the_same(worker: Worker) -> None:
    async with AsyncClient(worker.target) as client:
        assert [event async for event in client.execute("hello", job_id="job")] == HAPPY_EVENTS


async def test_generate_collects_the_answer(worker: Worker, client: Client) -> None:
    generation = client.generate("hello", job_id="job")
    assert generation.text == "Grüße 🌍"
    assert generation.token_ids == (7, 8, 9)
    assert [entry.id for entry in generation.logprobs] == [9]
    assert generation.end.stop_reason == "eos"
    assert generation.metrics is not None
    async with AsyncClient(worker.target) as async_client:
        assert await async_client.generate("hello", job_id="job") == generation


def test_an_unfinished_stream_is_no_generation() -> None:
    with pytest.raises(ValueError, match="completed stream"):
        Generation.from_events(HAPPY_EVENTS[:2])


def test_parameters_left_out_stay_unset(worker: Worker, client: Client) -> None:
    client.generate("hello", temperature=None)
    request = worker.requests[0]
    assert {field.name for field, _ in request.ListFields()} == {"job_id", "prompt"}
    assert len(request.job_id) == 36


def test_zero_is_not_unset(worker: Worker, client: Client) -> None:
    client.generate("hello", temperature=0.0, seed=0, top_k=0, logprobs=0, logit_bias={0: 0.0}, stop=["\n"])
    assert {field.name for field, _ in worker.requests[0].ListFields()} == {
        *("job_id", "prompt", "temperature", "seed", "top_k", "logprobs", "logit_bias", "stop")
    }


def test_a_response_format_is_text_or_a_mapping_and_one_of_its_kinds(worker: Worker, client: Client) -> None:
    client.generate("x", response_format={"json_schema": {"type": "object"}}, priority=-1, cache_salt="t")
    client.generate("x", response_format={"json_schema": "{}"})
    client.generate("x", response_format={"regex": "a|b"})
    formats = [request.response_format for request in worker.requests]
    assert [each.json_schema for each in formats[:2]] == ['{"type": "object"}', "{}"]
    assert formats[2].regex == "a|b"
    assert (worker.requests[0].priority, worker.requests[0].cache_salt) == (-1, "t")
    for wrong in ({}, {"json_schema": "{}", "regex": "a"}, {"xml": "a"}):
        with pytest.raises(ValueError, match="exactly one"):
            client.generate("x", response_format=wrong)  # type: ignore[typeddict-item, arg-type, unused-ignore]


def test_each_kind_of_input_is_sent_as_given(worker: Worker, client: Client) -> None:
    client.generate("")
    client.generate(messages=[{"role": "user", "content": "hi"}])
    client.generate(token_ids=[1, 2])
    client.generate(token_ids=[])
    kinds = [request.WhichOneof("input") for request in worker.requests]
    assert kinds == ["prompt", "chat", "prompt_tokens", "prompt_tokens"]
    assert worker.requests[1].chat.messages[0] == pb.ChatMessage(role="user", content="hi")
    assert list(worker.requests[2].prompt_tokens.ids) == [1, 2]


def test_requests_that_cannot_be_sent_are_refused_here(client: Client) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        client.execute()
    with pytest.raises(ValueError, match="exactly one"):
        client.execute("a", token_ids=[1])
    with pytest.raises(TypeError, match="one string"):
        client.execute("a", stop="\n")
    with pytest.raises(TypeError, match="unknown parameter: heat"):
        client.execute("a", heat=1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="out of range"):
        client.execute("a", seed=-1)


def test_metadata_correlation_id_and_deadline_travel(worker: Worker) -> None:
    with Client(worker.target, metadata=[("x-tenant", "t")], timeout_s=1000) as client:
        client.generate("a", correlation_id="c-1", timeout_s=50)
        assert worker.metadata["x-tenant"] == "t"
        assert worker.metadata["x-correlation-id"] == "c-1"
        assert worker.time_remaining is not None
        assert worker.time_remaining < 60
        client.generate("a")
        assert "x-correlation-id" not in worker.metadata
        assert 900 < worker.time_remaining < 1100


def refused(request: pb.ExecuteRequest, context: grpc.ServicerContext) -> Iterator[pb.ExecuteEvent]:
    violations = [
        error_details_pb2.BadRequest.FieldViolation(field="top_p", description="must be above 0", reason="RANGE"),
        error_details_pb2.BadRequest.FieldViolation(field="seed", description="must fit 64 bits"),
    ]
    refuse(
        context,
        code_pb2.INVALID_ARGUMENT,
        "2 fields are wrong",
        error_details_pb2.ErrorInfo(reason="INVALID_REQUEST", domain="tokenwire", metadata={"limit": "4"}),
        error_details_pb2.BadRequest(field_violations=violations),
        correlation_id="c-9",
    )
    yield pb.ExecuteEvent()


def check_refused(error: TokenwireRpcError) -> None:
    assert error.code == "INVALID_REQUEST"
    assert error.status is grpc.StatusCode.INVALID_ARGUMENT
    assert error.violations == (
        FieldViolation("top_p", "must be above 0", "RANGE"),
        FieldViolation("seed", "must fit 64 bits", ""),
    )
    assert not error.retriable
    assert error.retry_after_s is None
    assert error.correlation_id == "c-9"
    assert error.metadata == {"limit": "4"}
    assert str(error) == ("INVALID_REQUEST: 2 fields are wrong; top_p: must be above 0; seed: must fit 64 bits")


async def test_a_refusal_carries_every_violation(worker: Worker, client: Client) -> None:
    worker.script = refused
    with pytest.raises(TokenwireRpcError) as caught:
        client.generate("a")
    check_refused(caught.value)
    async with AsyncClient(worker.target) as async_client:
        with pytest.raises(TokenwireRpcError) as caught:
            await async_client.generate("a")
    check_refused(caught.value)


def overloaded(request: pb.ExecuteRequest, context: grpc.ServicerContext) -> Iterator[pb.ExecuteEvent]:
    delay = duration_pb2.Duration(seconds=1, nanos=500_000_000)
    info = error_details_pb2.ErrorInfo(reason="OVERLOADED")
    refuse(
        context, code_pb2.RESOURCE_EXHAUSTED, "the queue is full", info, error_details_pb2.RetryInfo(retry_delay=delay)
    )
    yield pb.ExecuteEvent()


def test_retry_information_makes_a_refusal_retriable(worker: Worker, client: Client) -> None:
    worker.script = overloaded
    with pytest.raises(TokenwireRpcError) as caught:
        client.generate("a")
    assert (caught.value.code, caught.value.retriable, caught.value.retry_after_s) == ("OVERLOADED", True, 1.5)


def fails_midway(request: pb.ExecuteRequest, context: grpc.ServicerContext) -> Iterator[pb.ExecuteEvent]:
    yield pb.ExecuteEvent(token=pb.Token(t="a", ids=[1]))
    resume = pb.ResumePoint(from_index=1, digest="0123")
    yield pb.ExecuteEvent(error=pb.Error(code="VRAM_OOM", message="out of memory", retriable=True, resume=resume))
    context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "less precise")


async def test_an_error_event_is_raised_with_the_final_status(worker: Worker, client: Client) -> None:
    worker.script = fails_midway
    stream = client.execute("a")
    assert isinstance(next(stream), Token)
    with pytest.raises(TokenwireRpcError) as caught:
        next(stream)
    assert (caught.value.code, caught.value.message) == ("VRAM_OOM", "out of memory")
    assert caught.value.status is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.retriable
    assert caught.value.resume == ResumePoint(from_index=1, digest="0123")
    assert list(stream) == []
    async with AsyncClient(worker.target) as async_client:
        with pytest.raises(TokenwireRpcError, match="VRAM_OOM: out of memory"):
            await async_client.generate("a")


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([pb.ExecuteEvent(token=pb.Token(t="a"))], "INTERNAL: the stream ended without a terminal event"),
        ([], "INTERNAL: the stream ended without a terminal event"),
        ([pb.ExecuteEvent(error=pb.Error(code="X", message="y"))], "X: y"),
    ],
)
async def test_a_stream_that_breaks_its_promise_is_an_error(
    worker: Worker, client: Client, events: list[pb.ExecuteEvent], expected: str
) -> None:
    worker.script = lambda request, context: iter(events)
    with pytest.raises(TokenwireRpcError, match=expected):
        list(client.execute("a"))
    async with AsyncClient(worker.target) as async_client:
        with pytest.raises(TokenwireRpcError, match=expected):
            _ = [event async for event in async_client.execute("a")]


def test_leaving_the_loop_cancels_the_job(worker: Worker, client: Client) -> None:
    worker.script = until_cancelled
    for event in client.execute("a"):
        assert isinstance(event, Started)
        break
    assert worker.call_ended.wait(TIMEOUT_S)


def test_closing_the_stream_cancels_the_job_and_ends_the_iteration(worker: Worker, client: Client) -> None:
    worker.script = until_cancelled
    with client.execute("a") as stream:
        next(stream)
    assert worker.call_ended.wait(TIMEOUT_S)
    assert list(stream) == []


async def test_leaving_the_async_loop_cancels_the_job(worker: Worker) -> None:
    worker.script = until_cancelled
    async with AsyncClient(worker.target) as client:
        async for event in client.execute("a"):
            assert isinstance(event, Started)
            break
        assert await asyncio.to_thread(worker.call_ended.wait, TIMEOUT_S)


async def test_cancelling_the_reading_task_cancels_the_job(worker: Worker) -> None:
    worker.script = until_cancelled
    async with AsyncClient(worker.target) as client:
        begun = asyncio.Event()

        async def read() -> None:
            async for _ in client.execute("a"):
                begun.set()

        task = asyncio.create_task(read())
        await asyncio.wait_for(begun.wait(), TIMEOUT_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(worker.call_ended.wait, TIMEOUT_S)


def test_a_deadline_that_passes_is_named(worker: Worker, client: Client) -> None:
    worker.script = until_cancelled
    with pytest.raises(TokenwireRpcError) as caught:
        client.generate("a", timeout_s=0.2)
    assert caught.value.code == "DEADLINE_EXCEEDED"


async def test_an_absent_worker_is_unavailable_and_retriable() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{reserved.getsockname()[1]}"
        with Client(target) as client, pytest.raises(TokenwireRpcError) as caught:
            client.health()
        assert (caught.value.code, caught.value.retriable) == ("UNAVAILABLE", True)
        async with AsyncClient(target) as async_client:
            with pytest.raises(TokenwireRpcError, match="UNAVAILABLE"):
                await async_client.cancel("a")


async def test_cancel_and_health_are_typed(worker: Worker, client: Client) -> None:
    report = client.health()
    assert (report.status, report.model, report.phase, report.pool_utilization) == ("healthy", "m", "ready", 0.25)
    assert client.cancel("job") == CancelResult("cancelled", 4)
    with pytest.raises(TokenwireRpcError, match="the job id is malformed"):
        client.cancel("bad id")
    async with AsyncClient(worker.target) as async_client:
        assert await async_client.health() == report
        assert await async_client.cancel("job") == CancelResult("cancelled", 4)


def test_damaged_details_leave_the_status(worker: Worker, client: Client) -> None:
    def damaged(request: pb.ExecuteRequest, context: grpc.ServicerContext) -> Iterator[pb.ExecuteEvent]:
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff\xff"),))
        context.set_code(grpc.StatusCode.NOT_FOUND)
        context.set_details("no such model")
        return iter(())

    worker.script = damaged
    with pytest.raises(TokenwireRpcError) as caught:
        client.generate("a")
    assert (caught.value.code, caught.value.message) == ("NOT_FOUND", "no such model")


def test_the_client_needs_neither_the_engine_nor_the_service() -> None:
    code = (
        "import sys, tokenwire.client\n"
        "foreign = {'tokenwire._native', 'tokenwire.engine', 'tokenwire.config', 'pydantic', 'typer', 'tokenizers'}\n"
        "print(sorted(foreign & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_proxy_is_not_asked_for_this_machine(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with Client(worker.target) as client:
        assert client.health().model == "m"
