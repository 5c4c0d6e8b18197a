"""When a client tries again before the first event, and when it must not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2

from scripted_worker import Worker
from tokenwire.client import (
    NO_RETRY,
    End,
    RetryPolicy,
    TokenwireRpcError,
)
from tokenwire.v1 import inference_pb2 as pb
from unit.client_script import (
    Step,
    breaks,
    ending,
    play,
    refuses,
    retry_info,
    run,
    run_async,
    sends,
    started,
    token,
)


async def test_a_refusal_that_says_when_is_retried_then(worker: Worker) -> None:
    full = refuses(code_pb2.RESOURCE_EXHAUSTED, "OVERLOADED", retry_info(0.15))
    play(worker, full, full, sends(started(), *ending(0)), full, sends(started(), *ending(0)))
    began = time.monotonic()
    assert isinstance(run(worker)[-1], End)
    assert time.monotonic() - began >= 0.3
    assert isinstance((await run_async(worker))[-1], End)


def test_attempts_are_bounded_and_the_last_error_is_told(worker: Worker) -> None:
    play(worker, *[refuses(code_pb2.RESOURCE_EXHAUSTED, "OVERLOADED", retry_info(0.001))] * 3)
    with pytest.raises(TokenwireRpcError, match="OVERLOADED"):
        run(worker)
    assert len(worker.requests) == 3


def test_a_worker_that_asks_for_patience_beyond_ours_is_not_waited_for(worker: Worker) -> None:
    play(worker, refuses(code_pb2.RESOURCE_EXHAUSTED, "OVERLOADED", retry_info(0.9)))
    began = time.monotonic()
    with pytest.raises(TokenwireRpcError) as caught:
        run(worker)
    assert caught.value.retry_after_s == 0.9
    assert time.monotonic() - began < 0.8


def pushes_back(value: str) -> Step:
    def step(request: Any, context: grpc.ServicerContext) -> Iterator[pb.ExecuteEvent]:
        context.set_trailing_metadata((("grpc-retry-pushback-ms", value),))
        context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        return iter(())

    return step


def test_the_pushback_trailer_is_obeyed(worker: Worker) -> None:
    play(worker, pushes_back("120"), sends(started(), *ending(0)))
    began = time.monotonic()
    run(worker)
    assert time.monotonic() - began >= 0.12
    for never in ("-1", "soon"):
        play(worker, pushes_back(never))
        with pytest.raises(TokenwireRpcError, match="UNAVAILABLE"):
            run(worker)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (code_pb2.INVALID_ARGUMENT, "INVALID_REQUEST"),
        (code_pb2.RESOURCE_EXHAUSTED, "KV_CAPACITY"),
        (code_pb2.ALREADY_EXISTS, "ALREADY_EXISTS"),
        (code_pb2.INTERNAL, "INTERNAL"),
    ],
)
@pytest.mark.parametrize("detach", [False, True])
def test_what_no_retry_can_help_is_told_at_once(worker: Worker, code: int, reason: str, detach: bool) -> None:
    play(worker, refuses(code, reason))
    with pytest.raises(TokenwireRpcError, match=reason):
        run(worker, detach=detach)


def test_a_plain_stream_is_never_started_twice_once_it_began(worker: Worker) -> None:
    for events in ([started()], [started(), token(0, 1)]):
        play(worker, breaks(*events))
        with pytest.raises(TokenwireRpcError, match="UNAVAILABLE"):
            run(worker)


def test_a_lost_first_call_may_be_met_by_the_second(worker: Worker) -> None:
    play(worker, breaks(), refuses(code_pb2.ALREADY_EXISTS, "ALREADY_EXISTS"), sends(started(), *ending(0)))
    assert isinstance(run(worker)[-1], End)


def test_no_retry_means_none(worker: Worker) -> None:
    for detach in (False, True):
        play(worker, breaks())
        with pytest.raises(TokenwireRpcError, match="UNAVAILABLE"):
            run(worker, NO_RETRY, detach=detach)


def test_the_deadline_covers_every_attempt_and_wait(worker: Worker) -> None:
    play(worker, *[refuses(code_pb2.RESOURCE_EXHAUSTED, "OVERLOADED", retry_info(0.2))] * 3)
    began = time.monotonic()
    with pytest.raises(TokenwireRpcError, match="OVERLOADED"):
        run(worker, RetryPolicy(attempts=100), timeout_s=0.5)
    assert time.monotonic() - began < 0.6


def test_waits_grow_are_spread_and_never_below_what_was_asked() -> None:
    policy = RetryPolicy(first_wait_s=0.1, most_wait_s=2)
    for failures, bound in ((1, 0.1), (2, 0.2), (5, 1.6), (6, 2.0), (10_000, 2.0)):
        waits = [policy.wait_s(failures) for _ in range(200)]
        assert max(waits) <= bound
        assert max(waits) > bound * 0.8
        assert min(waits) < bound * 0.2
    assert min(policy.wait_s(1, 3.0) for _ in range(50)) >= 3.0
