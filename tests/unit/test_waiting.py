"""Waiting with a bound: for what comes, for what does not, and for a cancel that comes at the same moment."""

from __future__ import annotations

import asyncio

import pytest

from tokenwire.waiting import wait_until


async def test_it_ends_with_the_event_or_with_the_time() -> None:
    event = asyncio.Event()
    assert not await wait_until(event, 0.01)
    assert not await wait_until(event, -1)
    asyncio.get_running_loop().call_later(0.01, event.set)
    assert await wait_until(event, 60)
    assert await wait_until(event, 60)


@pytest.mark.parametrize("event_first", [True, False])
async def test_a_cancel_at_the_same_moment_is_not_lost(event_first: bool) -> None:
    event = asyncio.Event()
    rounds = 0

    async def follow() -> None:
        nonlocal rounds
        while True:
            event.clear()
            await wait_until(event, 60)
            rounds += 1

    for turns in range(4):  # between the two, where one needs some turns of the loop to be heard of
        task = asyncio.create_task(follow())
        await asyncio.sleep(0.01)
        for act in (event.set, task.cancel) if event_first else (task.cancel, event.set):
            act()
            for _ in range(turns):
                await asyncio.sleep(0)
        _, late = await asyncio.wait([task], timeout=5)
        assert not late, "it goes on though it was cancelled"
        assert task.cancelled()
