"""A detached job's record: what each reader gets, what is dropped when, and that memory is counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from tokenwire.errors import TokenwireError
from tokenwire.rpc.replay import EVENT_BYTES, MAX_MERGED_TOKENS, RECORD_BYTES, Replay
from tokenwire.v1 import inference_pb2 as pb

STARTED = pb.ExecuteEvent(started=pb.Started(job_id="a")).SerializeToString()
METRICS = pb.ExecuteEvent(metrics=pb.Metrics(tokens_out=3)).SerializeToString()
END = pb.ExecuteEvent(end=pb.End(tokens_out=3)).SerializeToString()


def token(first: int, count: int = 1, text: str = "x") -> bytes:
    ids = range(first, first + count)
    return pb.ExecuteEvent(
        token=pb.Token(t=text * count, i=first, ids=ids, digest=f"d{first + count}")
    ).SerializeToString()


def replay_of(*events: bytes) -> Replay:
    replay = Replay(num_prompt_tokens=7)
    replay.set_started(STARTED)
    for event in events:
        replay.add(event)
    return replay


async def next_event(stream: AsyncGenerator[bytes, None]) -> pb.ExecuteEvent:
    return pb.ExecuteEvent.FromString(await asyncio.wait_for(anext(stream), 20))


async def rest(stream: AsyncGenerator[bytes, None]) -> list[pb.ExecuteEvent]:
    return [pb.ExecuteEvent.FromString(message) async for message in stream]


async def test_what_waits_is_merged_up_to_a_bound() -> None:
    replay = replay_of(*(token(i) for i in range(MAX_MERGED_TOKENS + 3)))
    stream = replay.read(0)
    await next_event(stream)
    first, second = await next_event(stream), await next_event(stream)
    assert (len(first.token.ids), len(second.token.ids)) == (MAX_MERGED_TOKENS, 3)
    assert (first.token.i, second.token.i) == (0, MAX_MERGED_TOKENS)
    assert first.token.digest == f"d{MAX_MERGED_TOKENS}"
    replay.add(token(MAX_MERGED_TOKENS + 3, text="é"))
    assert (await next_event(stream)).token.t == "é"
    await stream.aclose()


async def test_an_event_larger_than_the_bound_travels_alone() -> None:
    replay = replay_of(token(0), token(1, text="y" * 100_000), token(2))
    stream = replay.read(0)
    events = [await next_event(stream) for _ in range(4)]
    assert [event.token.i for event in events[1:]] == [0, 1, 2]
    await stream.aclose()


async def test_an_index_inside_an_event_gives_the_event_whole() -> None:
    replay = replay_of(token(0, 2), token(2, 3, "é"), token(5))
    replay.set_metrics(METRICS)
    replay.finish(END, None)
    for start in (2, 3, 4):
        events = await rest(replay.read(start))
        assert (events[1].token.i, events[1].token.t) == (2, "éééx")
    assert [event.WhichOneof("event") for event in await rest(replay.read(6))] == ["started", "metrics", "end"]


async def test_the_oldest_event_stays_while_somebody_needs_it() -> None:
    replay = replay_of(token(0), token(1), token(2))
    stream = replay.read(0)
    await next_event(stream)  # `started`: it has yet to take token 0
    assert not replay.drop_oldest()
    await next_event(stream)  # all three, merged
    assert replay.drop_oldest()
    assert replay.drop_oldest()
    assert not replay.drop_oldest(), "the newest is always kept"
    with pytest.raises(TokenwireError, match="before index 2") as caught:
        replay.check(0)
    assert caught.value.code == "NOT_FOUND"
    replay.check(2)
    await stream.aclose()


async def test_a_reader_that_is_too_slow_is_ended_and_others_are_not() -> None:
    replay = replay_of(token(0), token(1))
    slow, quick = replay.read(0), replay.read(2)
    for stream in (slow, quick):
        await next_event(stream)
    waiting = asyncio.ensure_future(next_event(quick))
    await asyncio.sleep(0)
    await replay.wait_for_readers(0.05)
    assert replay.num_readers == 1
    with pytest.raises(TokenwireError, match="SLOW_CONSUMER"):
        await rest(slow)
    replay.add(token(2))
    assert (await waiting).token.i == 2
    await quick.aclose()
    assert replay.num_readers == 0


async def test_waiting_ends_as_soon_as_the_reader_moves() -> None:
    replay = replay_of(token(0), token(1))
    stream = replay.read(0)
    await next_event(stream)
    waiting = asyncio.ensure_future(replay.wait_for_readers(60))
    await asyncio.sleep(0)
    assert not waiting.done()
    await next_event(stream)
    await asyncio.wait_for(waiting, 5)
    await stream.aclose()


@pytest.mark.parametrize("close_first", [False, True])
async def test_cancel_waits_for_the_event_in_hand(close_first: bool) -> None:
    replay = replay_of(token(0), token(1))
    stream = replay.read(0)
    await next_event(stream)
    await next_event(stream)  # in the hands of gRPC until the next is asked for
    replay.add(token(2))
    cancelling = asyncio.ensure_future(replay.cancel(60))
    await asyncio.sleep(0.01)
    assert not cancelling.done()
    if close_first:
        await stream.aclose()
    else:
        with pytest.raises(TokenwireError, match="CANCELLED"):
            assert not [event for event in await rest(stream) if event.HasField("token")]
    await asyncio.wait_for(cancelling, 5)


async def test_cancel_does_not_wait_for_ever() -> None:
    replay = replay_of(token(0))
    stream = replay.read(0)
    await next_event(stream)
    await next_event(stream)
    await asyncio.wait_for(replay.cancel(0.05), 5)
    await stream.aclose()


async def test_memory_is_counted_to_the_byte() -> None:
    replay = replay_of()
    assert replay.num_bytes == RECORD_BYTES
    events = [token(i, text="é" * i) for i in range(5)]
    for event in events:
        replay.add(event)
    assert replay.num_bytes == RECORD_BYTES + sum(len(event) + EVENT_BYTES for event in events)
    replay.drop_oldest()
    assert replay.num_bytes == RECORD_BYTES + sum(len(event) + EVENT_BYTES for event in events[1:])
    await replay.cancel(1)
    assert replay.num_bytes == RECORD_BYTES
    replay.add(token(5))
    assert replay.num_bytes == RECORD_BYTES
