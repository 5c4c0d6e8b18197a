"""How long a detached job is kept, and how much of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc

from service.helpers_attach import (
    TOKEN,
    WORDS,
    Request,
    attach,
    begin,
    collect,
    ids_of,
    read,
    text_of,
)
from service.helpers_security import until
from tokenwire.config_sources import load_settings
from tokenwire.engine.fake import FakeEngine


async def test_a_job_that_nobody_comes_back_to_is_stopped_after_its_grace(detaching: Any, request_of: Request) -> None:
    worker = await detaching(resume_grace_seconds=0.2)
    (await begin(worker, request_of, 2)).cancel()
    assert await asyncio.to_thread(worker.fake.jobs[0].cancelled.wait, 20)
    await until(lambda: worker.engine.num_live == 0)
    assert (await collect(attach(worker)))[1] is grpc.StatusCode.NOT_FOUND
    now = worker.state.snapshot()
    assert (now.detached_jobs, now.detached_bytes) == (0, 0)


async def test_a_job_that_is_read_needs_no_grace(detaching: Any, request_of: Request) -> None:
    worker = await detaching(resume_grace_seconds=0.1)
    call = await begin(worker, request_of, 2)
    await asyncio.sleep(0.5)
    worker.fake.step(len(WORDS))
    assert (await collect(call))[1] is grpc.StatusCode.OK
    await asyncio.sleep(0.3)  # ended, and read by nobody
    assert (await collect(attach(worker)))[1] is grpc.StatusCode.NOT_FOUND


def long_words() -> Iterator[str]:
    return (f"{n:04d} " * 400 for n in range(200))  # 2,000 bytes each


async def test_a_full_buffer_forgets_the_oldest_when_nobody_reads(start_worker: Any, request_of: Request) -> None:
    words = list(long_words())
    worker = await start_worker(fake=FakeEngine(words), settings=load_settings({"resume_job_bytes": 65536}, environ={}))
    (await begin(worker, request_of)).cancel()
    worker.fake.step(len(words))
    await until(lambda: worker.engine.num_live == 0)
    call = attach(worker)
    assert (await collect(call))[1] is grpc.StatusCode.NOT_FOUND
    first = int((await call.details()).split("index ")[1].split()[0])
    assert 160 < first < 175
    events, code = await collect(attach(worker, first))
    assert code is grpc.StatusCode.OK
    assert text_of(events) == "".join(words[first:])


async def test_many_finished_jobs_stay_below_the_total(start_worker: Any, request_of: Request) -> None:
    words = list(long_words())
    settings = {"resume_job_bytes": 10**6, "resume_total_bytes": 10**6}
    worker = await start_worker(fake=FakeEngine(words, eager=True), settings=load_settings(settings, environ={}))
    for n in range(5):  # 400 kB each
        call = worker.stub.Execute(request_of(f"job-{n}", detach=True, attach_token=TOKEN))
        assert text_of((await collect(call))[0]) == "".join(words)
    now = worker.state.snapshot()
    assert now.detached_jobs == 2
    assert 800_000 < now.detached_bytes <= 10**6
    kept = [(await collect(attach(worker, job_id=f"job-{n}")))[1] is grpc.StatusCode.OK for n in range(5)]
    assert kept == [False, False, False, True, True]


async def test_a_reader_that_takes_nothing_holds_the_job_up_for_a_while_only(
    start_worker: Any, request_of: Request
) -> None:
    words = [f"{n:05d}" * 10_000 for n in range(200)]  # 10 MB: more than connections buffer
    settings = load_settings({"resume_job_bytes": 10**6, "slow_reader_timeout_ms": 300}, environ={})
    options = [("grpc.max_receive_message_length", -1)]
    worker = await start_worker(fake=FakeEngine(words), settings=settings, channel_options=options)
    stuck = worker.stub.Execute(request_of(detach=True, attach_token=TOKEN))
    await read(stuck, 0)
    worker.fake.step(len(words))
    assert await worker.engine.wait_idle(20), "the job waits for a reader that never comes"
    # What it has in hand it still gets, and then the reason.
    events, code = await collect(stuck)
    assert code is grpc.StatusCode.ABORTED
    assert events[-1].error.code == "SLOW_CONSUMER"
    # It may come back for what is kept.
    seen = len(ids_of(events))
    assert 0 < seen < len(words)
    assert (await collect(attach(worker, seen)))[1] is grpc.StatusCode.NOT_FOUND
    events, code = await collect(attach(worker, len(words) - 5))
    assert code is grpc.StatusCode.OK
    assert text_of(events) == "".join(words[-5:])
