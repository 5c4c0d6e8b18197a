"""Refused calls in the log, at a rate that a caller cannot drive."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import Counter
from collections.abc import Callable

from tokenwire.observe.logging import get_logger

MAX_LINES_PER_SECOND = 20
# How long what was left out may wait for its line, seconds.
SUMMARY_S = 1.0


class RefusalLog:
    """At most `MAX_LINES_PER_SECOND` for each error code; those left out are counted in a line of their own.

    Belongs to the event loop's thread. `flush` it before the process ends.

    Args:
        clock: seconds; never goes back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._second = -1
        self._written: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()
        self._summary: asyncio.TimerHandle | None = None
        # What is left out is nobody's call: its line carries the context of the process, not that of a caller.
        self._context = contextvars.copy_context()

    def note(self, code: str, **fields: object) -> None:
        """Logs a refusal.

        Args:
            code: of the error; one of a small set.
            fields: about the call; nothing that it sent as a credential.
        """
        second = int(self._clock())
        if second != self._second:
            self._second = second
            self._written.clear()
        if self._written[code] < MAX_LINES_PER_SECOND:
            self._written[code] += 1
            get_logger().info("refused", code=code, **fields)
            return
        self._left_out[code] += 1
        if self._summary is None:
            loop = asyncio.get_running_loop()
            self._summary = loop.call_later(SUMMARY_S, self.flush, context=self._context)

    def flush(self) -> None:
        """Logs how many refusals were left out since the last time, a line for each code."""
        if self._summary is not None:
            self._summary.cancel()
            self._summary = None
        for code, count in self._left_out.items():
            get_logger().info("refused", code=code, left_out=count)
        self._left_out.clear()
