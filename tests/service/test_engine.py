"""The asyncio face of the engine by itself: what a cancel waits for, how a drain ends, who is told what."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator

import pytest

from tokenwire.engine import AsyncEngine, CancelOutcome, JobSpec, JobStream
from tokenwire.engine.async_engine import FROZEN_S, STREAMS_A_TURN, TURNS_BETWEEN, watch_engine
from tokenwire.engine.fake import FakeEngine, FakeOutcome
from tokenwire.engine.stream import END_TAG, METRICS_TAG, TOKEN_TAG
from tokenwire.errors import TokenwireError
from tokenwire.v1 import inference_pb2 as pb


@pytest.fixture
async def engine() -> AsyncIterator[AsyncEngine]:
    fake = FakeEngine()
    engine = AsyncEngine(fake)
    engine.attach()
    yield engine
    await engine.close()
    fake.close()


def fake_of(engine: AsyncEngine) -> FakeEngine:
    native = engine._native
    assert isinstance(native, FakeEngine)
    return native


def started(engine: AsyncEngine, job_id: str = "a") -> JobStream:
    stream = engine.open(job_id)
    engine.start(stream, JobSpec(job_id, "m", [1, 2], 10, seed=0))
    return stream


async def tags(stream: JobStream) -> list[int]:
    return [message[0] async for message in stream]


def test_tags_are_those_of_the_messages() -> None:
    def tag(event: pb.ExecuteEvent) -> int:
        return event.SerializeToString()[0]

    assert tag(pb.ExecuteEvent(token=pb.Token())) == TOKEN_TAG
    assert tag(pb.ExecuteEvent(metrics=pb.Metrics())) == METRICS_TAG
    assert tag(pb.ExecuteEvent(end=pb.End())) == END_TAG


async def test_cancel_waits_for_the_token_in_hand_and_drops_those_taken_after_it(engine: AsyncEngine) -> None:
    with started(engine) as stream:
        fake_of(engine).step(3)  # everything is taken in one batch: started, token, metrics, end
        await anext(stream)
        assert (await anext(stream))[0] == TOKEN_TAG  # now being written
        cancelling = asyncio.ensure_future(engine.cancel("a"))
        await asyncio.sleep(0)
        assert not cancelling.done(), "a token is still being written"
        rest = await tags(stream)
        assert (await cancelling).outcome is CancelOutcome.CANCELLED
        assert rest == [METRICS_TAG], "the end was not sent, so that the stream can end as cancelled"
        assert stream.failure is not None
        assert stream.failure.code == "CANCELLED"


async def test_no_token_taken_before_a_cancel_is_handed_out_after_it(engine: AsyncEngine) -> None:
    with started(engine) as stream:
        fake_of(engine).step(3)
        await anext(stream)  # `started`; the token waits behind it
        cancelling = asyncio.ensure_future(engine.cancel("a"))
        await asyncio.sleep(0)
        assert TOKEN_TAG not in await tags(stream)
        assert (await cancelling).outcome is CancelOutcome.CANCELLED


async def test_cancel_while_the_end_is_written_finds_the_job_finished(engine: AsyncEngine) -> None:
    with started(engine) as stream:
        fake_of(engine).step(3)
        while (await anext(stream))[0] != END_TAG:
            pass
        cancelling = asyncio.ensure_future(engine.cancel("a"))
        await asyncio.sleep(0)
        assert not cancelling.done()
        assert await tags(stream) == []
        assert (await cancelling).outcome is CancelOutcome.ALREADY_FINISHED
        assert stream.failure is None


async def test_leaving_a_stream_stops_its_job_and_frees_its_id(engine: AsyncEngine) -> None:
    with started(engine):
        pass
    assert fake_of(engine).jobs[0].cancelled.is_set()
    with started(engine):
        pass
    assert engine.num_live == 0


async def test_two_streams_do_not_mix(engine: AsyncEngine) -> None:
    with started(engine, "a") as a, started(engine, "b") as b:
        first, second = fake_of(engine).jobs
        second.step()
        await anext(b)
        assert (await anext(b))[0] == TOKEN_TAG
        first.finish(FakeOutcome(error_code="VRAM_OOM", error_message="out of memory"))
        await tags(a)
        assert a.failure is not None
        assert a.failure.code == "VRAM_OOM"
        fake_of(engine).step(3)
        assert END_TAG in await tags(b)
        assert b.failure is None


async def test_streams_that_all_have_output_leave_turns_of_the_loop_to_others(engine: AsyncEngine) -> None:
    streams = [started(engine, f"job-{i}") for i in range(40)]
    readers = [asyncio.ensure_future(anext(stream)) for stream in streams]
    num_read = [0]
    while num_read[-1] < len(streams):
        await asyncio.sleep(0)
        num_read.append(sum(reader.done() for reader in readers))
        assert len(num_read) < 10_000
    in_a_turn = [after - before for before, after in itertools.pairwise(num_read)]
    assert max(in_a_turn) == STREAMS_A_TURN
    first = next(turn for turn, count in enumerate(in_a_turn) if count)
    assert len(in_a_turn) - first > (len(streams) // STREAMS_A_TURN - 1) * TURNS_BETWEEN
    for stream in streams:
        stream.close()


async def test_drain_lets_running_jobs_finish(engine: AsyncEngine) -> None:
    stream = started(engine)
    draining = asyncio.ensure_future(engine.drain(60))
    await asyncio.sleep(0)
    with pytest.raises(TokenwireError, match="UNAVAILABLE"):
        engine.open("b")
    fake_of(engine).step(3)
    with stream:
        assert END_TAG in await tags(stream)
    assert await draining == 0


async def test_drain_ends_what_is_left_with_unavailable(engine: AsyncEngine) -> None:
    async def read(stream: JobStream) -> str:
        with stream:
            await tags(stream)
            assert stream.failure is not None
            return stream.failure.code

    readers = [asyncio.ensure_future(read(started(engine, job_id))) for job_id in "abc"]
    assert await engine.drain(0) == 3
    assert await asyncio.gather(*readers) == ["UNAVAILABLE"] * 3


async def test_drain_ends_a_job_that_is_still_being_prepared(engine: AsyncEngine) -> None:
    stream = engine.open("a")
    draining = asyncio.ensure_future(engine.drain(0))
    assert await asyncio.to_thread(fake_of(engine).failed_all.wait, 20)
    with stream, pytest.raises(TokenwireError, match="UNAVAILABLE"):
        engine.start(stream, JobSpec("a", "m", [1], 1, seed=0))
    assert await draining == 1


async def test_failure_reaches_every_stream_without_the_engine(engine: AsyncEngine) -> None:
    with started(engine) as stream:
        engine.fail(lambda: TokenwireError("INTERNAL", "the engine failed"))
        assert await tags(stream) == []
        assert stream.failure is not None
        assert stream.failure.message == "the engine failed"
    with pytest.raises(TokenwireError, match="the engine failed"):
        engine.open("b")


@pytest.mark.parametrize(
    ("name", "value", "reason"), [("failure", "threw", "threw"), ("heartbeat_age_ms", 5000.0, "5.0")]
)
async def test_the_watch_reports_a_dead_engine(engine: AsyncEngine, name: str, value: object, reason: str) -> None:
    watching = asyncio.ensure_future(watch_engine(engine, watchdog_s=4, interval_s=0))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not watching.done()
    setattr(fake_of(engine).state, name, value)
    assert reason in (await asyncio.wait_for(watching, 20)).reason


async def test_the_watch_does_not_count_the_time_in_which_it_stood_still_itself(engine: AsyncEngine) -> None:
    watching = asyncio.ensure_future(watch_engine(engine, watchdog_s=2, interval_s=0))
    await asyncio.sleep(0)
    fake_of(engine).state.heartbeat_age_ms = 5000.0
    time.sleep(FROZEN_S + 0.2)  # noqa: ASYNC251 (the process is frozen)
    thawed_at = time.monotonic()
    assert "2.0 s" in (await asyncio.wait_for(watching, 20)).reason
    assert time.monotonic() - thawed_at >= 2
