"""The background check that everything a GPU computes from lies in its own memory (W-44)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tokenwire.engine.native import NativeEngine


async def watch_residency(native: NativeEngine, interval_s: float, report: Callable[[str], None]) -> None:
    """Checks now and every `interval_s` seconds, in a thread, since the driver is asked.

    Args:
        report: called after every check with what lies elsewhere; empty for nothing.
    """
    loop = asyncio.get_running_loop()
    while True:
        report(await loop.run_in_executor(None, _check, native))
        await asyncio.sleep(interval_s)


def _check(native: NativeEngine) -> str:
    try:
        return native.check_residency()
    except Exception as error:  # noqa: BLE001 - a device that cannot say is no proof, whatever the reason
        return f"the device does not answer: {error}"
