"""Execute: the order of events, the one ending of every stream, cancel, deadline, disconnect."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from tokenwire.engine.fake import FakeEngine, FakeEngineError, FakeOutcome
from tokenwire.v1 import inference_pb2 as pb

Request = Callable[..., pb.ExecuteRequest]


def kinds(events: list[pb.ExecuteEvent]) -> list[str]:
    return [event.WhichOneof("event") for event in events]


async def collect(call: Any) -> tuple[list[pb.ExecuteEvent], grpc.aio.AioRpcError | None]:
    """All events of a stream, and its error if it ended in one."""
    events = []
    try:
        while (event := await asyncio.wait_for(call.read(), 20)) is not grpc.aio.EOF:
            events.append(event)
        if await call.code() is not grpc.StatusCode.OK:
            await call.wait_for_connection()  # raises the error that the stream ended in
    except grpc.aio.AioRpcError as error:
        return events, error
    return events, None


async def next_event(call: Any) -> pb.ExecuteEvent:
    event = await asyncio.wait_for(call.read(), 20)
    assert event is not grpc.aio.EOF
    return event


async def test_events_come_in_order_with_one_terminal(worker: Any, request_of: Request) -> None:
    worker.fake.eager = True
    events, error = await collect(worker.stub.Execute(request_of(seed=7)))
    assert error is None
    assert kinds(events) == ["started", "token", "metrics", "end"]
    started = events[0].started
    assert (started.job_id, started.model, started.seed, started.prompt_tokens) == ("job-1", "test-model", 7, 5)
    assert events[1].token.t == "Hello world!"
    assert events[-1].end.stop_reason == pb.STOP_REASON_EOS


async def test_each_token_travels_as_soon_as_it_exists(worker: Any, request_of: Request) -> None:
    call = worker.stub.Execute(request_of())
    assert (await next_event(call)).HasField("started")
    for index, text in enumerate(worker.fake.tokens):
        worker.fake.step()
        token = (await next_event(call)).token
        assert (token.t, token.i, list(token.ids)) == (text, index, [index])
    events, error = await collect(call)
    assert error is None
    assert kinds(events) == ["metrics", "end"]


async def test_the_prompt_is_tokenised_off_the_loop(worker: Any, request_of: Request) -> None:
    worker.text.gate.clear()
    call = worker.stub.Execute(request_of())
    assert await asyncio.to_thread(worker.text.entered.acquire, timeout=20)
    # The loop is free: another call is answered while the tokenizer is held.
    health = await worker.stub.Health(pb.HealthRequest(), timeout=20)
    assert health.status == pb.HealthResponse.STATUS_HEALTHY
    worker.text.gate.set()
    assert (await next_event(call)).HasField("started")
    call.cancel()


async def test_unset_differs_from_zero(worker: Any, request_of: Request) -> None:
    worker.fake.eager = True
    await collect(worker.stub.Execute(request_of("a")))
    await collect(worker.stub.Execute(request_of("b", temperature=0, top_k=0, logprobs=0, seed=0, min_p=0)))
    unset, zero = (job.spec for job in worker.fake.jobs)
    assert (unset["temperature"], unset["top_p"], unset["top_k"], unset["logprobs"]) == (1.0, 1.0, 0, -1)
    assert (unset["repetition_penalty"], unset["min_p"], unset["max_tokens"]) == (1.0, 0.0, 2048)
    assert (unset["priority"], unset["cache_salt"]) == (0, b"")
    assert (zero["temperature"], zero["logprobs"], zero["seed"]) == (0.0, 0, 0)


async def test_an_absent_seed_is_drawn_anew_each_time(worker: Any, request_of: Request) -> None:
    worker.fake.eager = True
    for n in range(30):
        await collect(worker.stub.Execute(request_of(f"job-{n}")))
    seeds = {job.spec["seed"] for job in worker.fake.jobs}
    assert len(seeds) == 30
    # JavaScript's numbers hold them, and nearly all of that range is used.
    assert 2**45 < max(seeds) < 2**53


async def test_the_full_seed_range_is_accepted(worker: Any, request_of: Request) -> None:
    worker.fake.eager = True
    events, error = await collect(worker.stub.Execute(request_of(seed=2**64 - 1)))
    assert error is None
    assert events[0].started.seed == 2**64 - 1


async def test_parameters_reach_the_engine(worker: Any, request_of: Request) -> None:
    worker.fake.eager = True
    chat = pb.Chat(messages=[pb.ChatMessage(role="system", content="ab"), pb.ChatMessage(role="user", content="cd")])
    sent = request_of(
        chat=chat,
        max_tokens=9,
        temperature=0.5,
        top_p=0.25,
        top_k=4,
        min_p=0.125,
        repetition_penalty=1.5,
        frequency_penalty=-1.5,
        presence_penalty=1.25,
        logit_bias={3: -100.0},
        logprobs=2,
        stop=["é", "end"],
        priority=-2,
        cache_salt="tenant é",
    )
    await collect(worker.stub.Execute(sent))
    spec = worker.fake.jobs[0].spec
    assert spec["prompt_ids"] == [ord(c) for c in "abcd"]
    assert spec["stop"] == ["é".encode(), b"end"]
    assert spec["logit_bias"] == {3: -100.0}
    assert (spec["priority"], spec["cache_salt"]) == (-2, "tenant é".encode())
    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    assert [spec[name] for name in names] == [9, 0.5, 0.25, 4, 0.125, 1.5]
    assert (spec["frequency_penalty"], spec["presence_penalty"], spec["logprobs"]) == (-1.5, 1.25, 2)


async def test_after_cancel_returns_no_token_is_sent(worker: Any, request_of: Request) -> None:
    call = worker.stub.Execute(request_of())
    await next_event(call)
    worker.fake.step()
    assert (await next_event(call)).token.t == "Hello"
    worker.fake.step()  # this token races with the cancel: it may come before it returns, never after
    response = await worker.stub.Cancel(pb.CancelRequest(job_id="job-1"))
    assert response.outcome == pb.CancelResponse.OUTCOME_CANCELLED
    assert response.tokens_out == 2
    worker.fake.step()
    events, error = await collect(call)
    assert [k for k in kinds(events) if k != "token"] == ["metrics", "error"]
    assert "!" not in "".join(event.token.t for event in events)
    assert (events[-1].error.code, events[-1].error.retriable) == ("CANCELLED", False)
    assert error is not None
    assert error.code() is grpc.StatusCode.CANCELLED


async def test_cancel_is_idempotent_and_remembers_finished_jobs(worker: Any, request_of: Request) -> None:
    worker.fake.eager = True
    for n in range(5):
        await collect(worker.stub.Execute(request_of(f"job-{n}")))
    for _ in range(2):
        response = await worker.stub.Cancel(pb.CancelRequest(job_id="job-4"))
        assert (response.outcome, response.tokens_out) == (pb.CancelResponse.OUTCOME_ALREADY_FINISHED, 3)
    for unknown in ("job-0", "never"):  # job-0 is beyond the three that this worker remembers
        response = await worker.stub.Cancel(pb.CancelRequest(job_id=unknown))
        assert response.outcome == pb.CancelResponse.OUTCOME_NOT_FOUND


async def test_a_job_still_being_tokenised_can_be_cancelled(worker: Any, request_of: Request) -> None:
    worker.text.gate.clear()
    call = worker.stub.Execute(request_of())
    assert await asyncio.to_thread(worker.text.entered.acquire, timeout=20)
    response = await worker.stub.Cancel(pb.CancelRequest(job_id="job-1"))
    assert response.outcome == pb.CancelResponse.OUTCOME_CANCELLED
    worker.text.gate.set()
    events, error = await collect(call)
    assert kinds(events) == ["metrics", "error"]
    assert error is not None
    assert error.code() is grpc.StatusCode.CANCELLED
    assert worker.fake.jobs == []


async def test_cancel_of_a_reader_that_does_not_read_returns(worker: Any, request_of: Request) -> None:
    """More text than the flow-control window holds: the write in hand never finishes, the cancel still does."""
    worker.fake.tokens = ["x" * 1_000_000] * 8
    call = worker.stub.Execute(request_of())
    await next_event(call)
    job = await worker.submitted()
    worker.fake.step(7)
    response = await asyncio.wait_for(worker.stub.Cancel(pb.CancelRequest(job_id="job-1")), 20)
    assert response.outcome == pb.CancelResponse.OUTCOME_CANCELLED
    assert job.cancelled.is_set()
    call.cancel()


async def test_a_live_job_id_is_refused_and_its_owner_is_not_disturbed(worker: Any, request_of: Request) -> None:
    call = worker.stub.Execute(request_of())
    await next_event(call)
    events, error = await collect(worker.stub.Execute(request_of()))
    assert events == []
    assert error is not None
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    worker.fake.step(3)
    events, error = await collect(call)
    assert error is None
    assert kinds(events)[-1] == "end"
    worker.fake.eager = True
    events, error = await collect(worker.stub.Execute(request_of()))
    assert error is None, "a finished job's id may be used again"


async def test_closing_the_stream_stops_the_job(worker: Any, request_of: Request) -> None:
    call = worker.stub.Execute(request_of())
    await next_event(call)
    job = await worker.submitted()
    call.cancel()
    assert await asyncio.to_thread(job.cancelled.wait, 20)
    assert await worker.engine.wait_idle(20)


async def test_a_lost_connection_stops_the_job(worker: Any, request_of: Request) -> None:
    channel = grpc.aio.insecure_channel(worker.target)
    call = channel.unary_stream(
        "/tokenwire.v1.Inference/Execute", pb.ExecuteRequest.SerializeToString, pb.ExecuteEvent.FromString
    )(request_of())
    await next_event(call)
    job = await worker.submitted()
    await channel.close(grace=None)
    assert await asyncio.to_thread(job.cancelled.wait, 20)


async def test_the_deadline_of_the_call_stops_a_running_job(worker: Any, request_of: Request) -> None:
    call = worker.stub.Execute(request_of(), timeout=1)
    job = await worker.submitted()
    _, error = await collect(call)
    assert error is not None
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert await asyncio.to_thread(job.cancelled.wait, 20)


async def test_the_deadline_stops_a_job_that_is_still_tokenised(worker: Any, request_of: Request) -> None:
    worker.text.gate.clear()
    _, error = await collect(worker.stub.Execute(request_of(), timeout=0.3))
    assert error is not None
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert await worker.engine.wait_idle(20)
    worker.text.gate.set()
    assert worker.fake.jobs == []


async def test_the_engine_gets_the_shorter_of_deadline_and_timeout(start_worker: Any, request_of: Request) -> None:
    worker = await start_worker(fake=FakeEngine(eager=True))
    await collect(worker.stub.Execute(request_of("none")))
    await collect(worker.stub.Execute(request_of("short"), timeout=50))
    await collect(worker.stub.Execute(request_of("long"), timeout=1e6))
    none, short, long = (job.spec["timeout_ms"] for job in worker.fake.jobs)
    assert 290_000 < none <= 300_000
    assert 40_000 < short <= 51_000  # gRPC rounds a deadline up on its way
    assert 290_000 < long <= 300_000


async def test_a_timeout_in_the_engine_ends_the_stream_with_its_error(worker: Any, request_of: Request) -> None:
    call = worker.stub.Execute(request_of())
    job = await worker.submitted()
    worker.fake.step()
    job.finish(FakeOutcome(error_code="INFERENCE_TIMEOUT", error_message="the deadline passed"))
    events, error = await collect(call)
    assert [k for k in kinds(events) if k != "token"] == ["started", "metrics", "error"]
    assert (events[-1].error.code, events[-1].error.retriable) == ("INFERENCE_TIMEOUT", True)
    assert error is not None
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("code", ["INTERNAL", "CUDA_ERROR", "NOT_A_CODE_OF_OURS"])
async def test_what_went_wrong_inside_is_not_told(worker: Any, request_of: Request, code: str) -> None:
    call = worker.stub.Execute(request_of())
    job = await worker.submitted()
    job.finish(FakeOutcome(error_code=code, error_message="segfault at /secret/path"))
    events, error = await collect(call)
    assert error is not None
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in error.details() + events[-1].error.message


async def test_an_exception_in_the_engine_is_internal_and_says_nothing(worker: Any, request_of: Request) -> None:
    worker.fake.submit_error = ValueError("secret path /models/x")
    events, error = await collect(worker.stub.Execute(request_of()))
    assert events == []
    assert error is not None
    assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, "internal error")
    assert "secret" not in repr(error.trailing_metadata())


@pytest.mark.parametrize(
    ("code", "status", "pushback"),
    [
        ("OVERLOADED", grpc.StatusCode.RESOURCE_EXHAUSTED, "1000"),
        ("KV_CAPACITY", grpc.StatusCode.RESOURCE_EXHAUSTED, "-1"),
        ("CONTEXT_LENGTH_EXCEEDED", grpc.StatusCode.OUT_OF_RANGE, None),
        ("UNAVAILABLE", grpc.StatusCode.UNAVAILABLE, "1000"),
    ],
)
async def test_a_refusal_sends_no_event_and_no_initial_metadata(
    worker: Any, request_of: Request, code: str, status: grpc.StatusCode, pushback: str | None
) -> None:
    worker.fake.submit_error = FakeEngineError(code, "no room")
    call = worker.stub.Execute(request_of())
    events, error = await collect(call)
    assert events == []
    assert error is not None
    assert error.code() is status
    # An answer without initial metadata is what a client's retry policy may act on.
    assert tuple(await call.initial_metadata()) == ()
    trailers = dict(await call.trailing_metadata())
    assert trailers.get("grpc-retry-pushback-ms") == pushback
    details = rpc_status.from_call(error).details
    kinds_of_detail = {detail.TypeName() for detail in details}
    assert ("google.rpc.RetryInfo" in kinds_of_detail) == (code in ("OVERLOADED", "UNAVAILABLE"))
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in details)
    assert (info.reason, info.domain) == (code, "tokenwire")
