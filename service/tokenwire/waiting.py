"""Waiting with a bound."""

from __future__ import annotations

import asyncio


async def wait_until(event: asyncio.Event, timeout_s: float) -> bool:
    """Waits for an event, but no longer than this; whether it is set.

    Unlike `asyncio.wait_for` before Python 3.12 it never loses a cancel that comes at the same moment as the event: a
    task that waits in a loop would then go on for ever.
    """
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait((waiting,), timeout=timeout_s)
    finally:
        waiting.cancel()
    return event.is_set()
