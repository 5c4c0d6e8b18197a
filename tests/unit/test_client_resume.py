"""A detached stream that broke is taken up again, or is not, and the caller sees one stream."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2

from scripted_worker import TIMEOUT_S, Worker, until_cancelled
from tokenwire.client import (
    AsyncClient,
    Client,
    Event,
    Generation,
    RetryPolicy,
    Started,
    Token,
    TokenwireRpcError,
)
from tokenwire.client.session import Session
from tokenwire.v1 import inference_pb2 as pb
from unit.client_script import (
    NOT_FOUND,
    QUICK,
    WORDS,
    Step,
    breaks,
    ending,
    methods,
    play,
    refuses,
    retry_info,
    run,
    run_async,
    sends,
    started,
    token,
)


async def test_a_broken_stream_is_one_stream_to_the_caller(worker: Worker) -> None:
    def steps() -> list[Step]:
        return [
            breaks(started(), token(0, 1), token(1, 2)),
            breaks(started()),
            breaks(started(), token(2, 4)),
            breaks(started(), token(4, 5), ending()[0]),
            sends(started(), *ending()),
        ]

    play(worker, *steps())
    events = run(worker, detach=True)
    assert [type(event).__name__ for event in events] == ["Started", *["Token"] * 4, "Metrics", "End"]
    assert Generation.from_events(events).text == "".join(WORDS)
    assert methods(worker) == ["Execute", *["Attach"] * 4]
    execute, *attaches = worker.requests
    assert [attach.from_index for attach in attaches] == [2, 2, 4, 5]
    assert execute.detach
    assert {attach.attach_token for attach in attaches} == {execute.attach_token}
    assert len(execute.attach_token) >= 40
    worker.requests.clear()
    play(worker, *steps())
    assert await run_async(worker, detach=True) == events


def test_a_stream_that_broke_before_it_began_is_attached_to_or_sent_again(worker: Worker) -> None:
    play(worker, breaks(), sends(started(), token(0, 5), *ending()))
    assert Generation.from_events(run(worker, detach=True)).text == "".join(WORDS)
    assert methods(worker) == ["Execute", "Attach"]
    worker.requests.clear()
    play(worker, breaks(), NOT_FOUND, sends(started(), token(0, 5), *ending()))
    run(worker, detach=True)
    assert methods(worker) == ["Execute", "Attach", "Execute"]
    assert not worker.requests[2].HasField("seed")


def test_a_worker_that_is_not_there_is_not_tried_for_long(worker: Worker) -> None:
    play(worker, *[breaks()] * 3)
    with pytest.raises(TokenwireRpcError, match="UNAVAILABLE"):
        run(worker, detach=True)


@pytest.mark.parametrize("known", range(1, 5))
def test_a_forgotten_job_is_generated_anew_with_its_seed(worker: Worker, known: int) -> None:
    # Events may be grouped in another way than the first time.
    again = [started(), token(0, 2), token(2, 5), *ending()]
    play(worker, breaks(started(), token(0, known)), NOT_FOUND, sends(*again))
    events = run(worker, detach=True)
    assert methods(worker) == ["Execute", "Attach", "Execute"]
    assert worker.requests[2].seed == 5
    tokens = [event for event in events if isinstance(event, Token)]
    assert "".join(event.text for event in tokens) == "".join(WORDS)
    assert [i for event in tokens for i in event.ids] == list(range(5))
    assert tokens[1].index == known


def test_a_worker_that_is_still_loading_is_asked_again_for_the_job_itself(worker: Worker) -> None:
    loading = refuses(code_pb2.UNAVAILABLE, "UNAVAILABLE", retry_info(0.001))
    again = sends(started(), token(0, 2), token(2, 5), *ending())
    play(worker, breaks(started(), token(0, 2)), NOT_FOUND, loading, loading, again)
    assert Generation.from_events(run(worker, detach=True)).text == "".join(WORDS)
    assert methods(worker) == ["Execute", "Attach", "Execute", "Execute", "Execute"]


def test_an_answer_generated_anew_that_differs_is_told(worker: Worker) -> None:
    first = breaks(started(), token(0, 2))
    others: list[list[pb.ExecuteEvent]] = [
        [started(seed=6)],
        [started(), token(0, 2), token(2, 3, digest="0" * 16)],
        [started(), token(0, 1), *ending(1)],
        [started(), token(1, 2)],
    ]
    for other in others:
        play(worker, first, NOT_FOUND, sends(*other))
        with pytest.raises(TokenwireRpcError, match="DIGEST_MISMATCH") as caught:
            run(worker, detach=True)
        assert caught.value.status is grpc.StatusCode.DATA_LOSS


@pytest.mark.parametrize("code", ["UNAVAILABLE", "SLOW_CONSUMER"])
def test_an_error_that_leaves_the_job_to_be_had_is_resumed(worker: Worker, code: str) -> None:
    error = pb.ExecuteEvent(error=pb.Error(code=code, message="the worker is shutting down", retriable=True))
    play(worker, sends(started(), token(0, 2), ending()[0], error), sends(started(), token(2, 5), *ending()))
    events = run(worker, detach=True)
    assert Generation.from_events(events).text == "".join(WORDS)


def test_the_jobs_own_error_ends_the_stream(worker: Worker) -> None:
    error = pb.ExecuteEvent(error=pb.Error(code="CANCELLED", message="the job was cancelled"))
    play(worker, sends(started(), token(0, 2), ending()[0], error))
    seen: list[Event] = []
    with Client(worker.target, retry=QUICK) as client, pytest.raises(TokenwireRpcError, match="CANCELLED"):
        seen.extend(client.execute("a", detach=True))
    with Client(worker.target, retry=QUICK) as client:
        play(worker, sends(started(), token(0, 2), ending()[0], error))
        stream = client.execute("a", detach=True)
        kinds = [type(next(stream)).__name__ for _ in range(3)]
        with pytest.raises(TokenwireRpcError, match="CANCELLED"):
            next(stream)
        assert kinds == ["Started", "Token", "Metrics"]
        assert list(stream) == []


def test_resuming_gives_up_after_its_time(worker: Worker) -> None:
    worker.script = breaks(started(), token(0, 2))
    policy = RetryPolicy(first_wait_s=0.01, most_wait_s=0.05, resume_for_s=0.3)

    def once(request: Any, context: grpc.ServicerContext) -> Iterator[pb.ExecuteEvent]:
        worker.script = breaks()
        return breaks(started(), token(0, 2))(request, context)

    worker.script = once
    began = time.monotonic()
    with pytest.raises(TokenwireRpcError, match="UNAVAILABLE"):
        run(worker, policy, detach=True)
    assert 0.3 <= time.monotonic() - began < 3
    assert len(worker.requests) > 4


def test_leaving_a_detached_stream_cancels_its_job_and_leave_does_not(worker: Worker) -> None:
    worker.script = until_cancelled
    with Client(worker.target) as client:
        with client.execute("a", job_id="cancelled", detach=True) as stream:
            next(stream)
        dropped = client.execute("a", job_id="dropped", detach=True)
        next(dropped)
        del dropped
        left = client.execute("a", job_id="left", detach=True)
        next(left)
        left.leave()
        assert list(left) == []
    assert sorted(worker.cancelled) == ["cancelled", "dropped"]


async def test_leaving_an_async_detached_stream_is_the_same(worker: Worker) -> None:
    worker.script = until_cancelled
    async with AsyncClient(worker.target) as client:
        async with client.execute("a", job_id="cancelled", detach=True) as stream:
            await anext(stream)
        left = client.execute("a", job_id="left", detach=True)
        await anext(left)
        left.leave()
        assert [event async for event in left] == []
        reading = asyncio.Event()

        async def read() -> None:
            async for _ in client.execute("a", job_id="task", detach=True):
                reading.set()

        task = asyncio.create_task(read())
        await asyncio.wait_for(reading.wait(), TIMEOUT_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert sorted(worker.cancelled) == ["cancelled", "task"]


def test_a_deadline_that_passes_takes_a_detached_job_with_it(worker: Worker) -> None:
    worker.script = until_cancelled
    with Client(worker.target) as client, pytest.raises(TokenwireRpcError, match="DEADLINE_EXCEEDED"):
        list(client.execute("a", job_id="late", detach=True, timeout_s=0.3))
    assert worker.cancelled == ["late"]


def test_close_ends_a_wait(worker: Worker) -> None:
    slow = RetryPolicy(attempts=5, most_wait_s=60)
    play(worker, refuses(code_pb2.RESOURCE_EXHAUSTED, "OVERLOADED", retry_info(0.9)), sends(started(), *ending(0)))
    with Client(worker.target, retry=slow) as client:
        stream = client.execute("a")
        threading.Timer(0.2, stream.close).start()
        began = time.monotonic()
        assert list(stream) == []
        assert time.monotonic() - began < 0.8


async def test_another_client_can_take_a_stream_up(worker: Worker) -> None:
    play(worker, sends(started(), token(2, 3), token(3, 5), *ending()))
    with Client(worker.target, retry=QUICK) as client:
        stream = client.attach("job", "t" * 20, 2)
        text = "".join(event.text for event in stream if isinstance(event, Token))
    assert text == "".join(WORDS[2:])
    assert stream.next_index == 5
    [request] = worker.requests
    assert (request.job_id, request.attach_token, request.from_index) == ("job", "t" * 20, 2)
    play(worker, breaks(started(), token(0, 3)), sends(started(), token(3, 5), *ending()))
    async with AsyncClient(worker.target, retry=QUICK) as async_client:
        events = [event async for event in async_client.attach("job", "t" * 20)]
    assert isinstance(events[0], Started)
    assert Generation.from_events(events).text == "".join(WORDS)
    play(worker, NOT_FOUND)
    with Client(worker.target, retry=QUICK) as client, pytest.raises(TokenwireRpcError, match="NOT_FOUND"):
        list(client.attach("job", "t" * 20))


def test_a_stream_without_a_terminal_event_is_taken_up_too() -> None:
    session = Session(pb.ExecuteRequest(job_id="job", detach=True), QUICK, None)
    session.receive(started())
    session.receive(token(0, 2))
    assert session.ended() == 0.0
    assert isinstance(session.request, pb.AttachRequest)
    assert session.request.from_index == 2
