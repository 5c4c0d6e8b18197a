"""The guard at the gRPC port: when a caller must wait, and what counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from google.rpc import error_details_pb2

from service.helpers_security import (
    DETACHED,
    FakeClock,
    Keys,
    bearer,
    details,
    execute,
    failure_of,
    run_to_end,
    started,
    until,
)
from tokenwire.security.guard import Guard
from tokenwire.security.keys import create_key
from tokenwire.security.principal import Quota
from tokenwire.v1 import inference_pb2 as pb

Request = Callable[..., pb.ExecuteRequest]


def retry_after_ms(error: grpc.aio.AioRpcError) -> int:
    """What RetryInfo says, which the pushback trailer repeats."""
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    delay = details(error, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds()
    assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == str(delay)
    return int(delay)


async def test_p16_a_rate_is_refused_with_when_to_come_back(start_guarded: Any, keys: Keys) -> None:
    """P16, W-30: RESOURCE_EXHAUSTED + RetryInfo + QuotaFailure + pushback; the time it names is right."""
    clock = FakeClock()
    new, other = keys.add("a"), keys.add("b", requests_per_minute=0)
    worker = await start_guarded(each=Quota(requests_per_minute=2), clock=clock)
    worker.fake.eager = True
    for number in range(2):
        await run_to_end(execute(worker, new, f"a-{number}"))
    error = await failure_of(execute(worker, new))
    quota = details(error, error_details_pb2.QuotaFailure).violations[0]
    assert quota.subject == "requests_per_minute"
    info = details(error, error_details_pb2.ErrorInfo)
    assert (info.reason, info.metadata["limit"], info.metadata["retriable"]) == ("OVERLOADED", "2", "true")
    # Cancel and health have no rate, and a key with limits of its own is not held to the others'.
    await worker.stub.Cancel(pb.CancelRequest(job_id="x"), metadata=bearer(new))
    for number in range(5):
        await run_to_end(execute(worker, other, f"b-{number}"))
    clock.now_s += retry_after_ms(error) / 1000
    await run_to_end(execute(worker, new))


async def test_open_requests_are_capped_and_come_free_however_they_end(start_guarded: Any, keys: Keys) -> None:
    new = keys.add(concurrent_requests=2)
    worker = await start_guarded()
    for round_ in range(5):
        calls = [await started(worker, new, f"{round_}-{n}") for n in range(2)]
        assert retry_after_ms(await failure_of(execute(worker, new, "x"))) == 1000
        calls[0].cancel()
        await worker.stub.Cancel(pb.CancelRequest(job_id=f"{round_}-1"), metadata=bearer(new))
        await failure_of(calls[1])
        await until(lambda: not any(job.live for job in worker.fake.jobs))
        # A request that is refused by its fields leaves no place taken either.
        bad = await failure_of(execute(worker, new, "y", temperature=9))
        assert bad.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_tokens_are_counted_as_they_were_used(start_guarded: Any, keys: Keys) -> None:
    """A generation reserves prompt + max_tokens before it starts, and counts what it came to when it ended."""
    clock = FakeClock()
    new = keys.add(tokens_per_minute=100)
    worker = await start_guarded(clock=clock)
    worker.fake.eager = True
    for number in range(2):  # 5 in + 3 out each, of 5 + 80
        await run_to_end(execute(worker, new, f"j{number}", max_tokens=80))
    error = await failure_of(execute(worker, new, "no", max_tokens=80))
    assert details(error, error_details_pb2.ErrorInfo).metadata["quota"] == "tokens_per_minute"
    assert len(worker.fake.jobs) == 2
    await run_to_end(execute(worker, new, "yes", max_tokens=79))
    clock.now_s += retry_after_ms(error) / 1000
    await run_to_end(execute(worker, new, "again", max_tokens=80))


async def test_limits_hold_on_an_open_worker_too(start_worker: Any, request_of: Request) -> None:
    worker = await start_worker(guard=Guard(overall=Quota(requests_per_minute=1), clock=FakeClock()))
    worker.fake.eager = True
    await run_to_end(worker.stub.Execute(request_of("a")))
    retry_after_ms(await failure_of(worker.stub.Execute(request_of("b"))))


async def test_a_detached_job_counts_as_open_until_it_ends(start_guarded: Any, keys: Keys) -> None:
    """Else a caller could leave one after the other behind and have as many run as it likes."""
    new = keys.add(concurrent_requests=1)
    worker = await start_guarded()
    call = await started(worker, new, "left", **DETACHED)
    call.cancel()
    for _ in range(3):
        retry_after_ms(await failure_of(execute(worker, new, "next")))
    worker.fake.step(3)
    await until(lambda: worker.guard.num_open == 0)
    worker.fake.eager = True
    await run_to_end(execute(worker, new, "next"))
    attach = pb.AttachRequest(job_id="left", attach_token=DETACHED["attach_token"])
    assert (await run_to_end(worker.stub.Attach(attach, metadata=bearer(new))))[-1].HasField("end")


async def test_a_detached_job_settles_its_tokens_when_it_ends(start_guarded: Any, keys: Keys) -> None:
    new = keys.add(tokens_per_minute=100)
    worker = await start_guarded(clock=FakeClock())
    call = await started(worker, new, "left", max_tokens=90, **DETACHED)
    call.cancel()
    retry_after_ms(await failure_of(execute(worker, new, "next", max_tokens=85)))
    worker.fake.step(3)
    await until(lambda: worker.engine.num_live == 0)
    worker.fake.eager = True
    assert (await run_to_end(execute(worker, new, "next", max_tokens=85)))[-1].HasField("end")


async def test_wrong_keys_spend_nobodys_rate_and_no_memory(start_guarded: Any, keys: Keys) -> None:
    new = keys.add()
    worker = await start_guarded(each=Quota(requests_per_minute=1), overall=Quota(requests_per_minute=1))
    worker.fake.eager = True
    for _ in range(200):
        error = await failure_of(execute(worker, create_key("x")))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert (worker.guard.limiter.num_remembered, worker.guard.num_open) == (0, 0)
    assert (await run_to_end(execute(worker, new)))[-1].HasField("end")
