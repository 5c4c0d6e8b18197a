"""Refused calls in the log, at a rate that a caller cannot drive."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from tokenwire.observe.logging import get_logger

MAX_LINES_PER_SECOND = 20


class RefusalLog:
    """At most `MAX_LINES_PER_SECOND` for each error code; the next line says how many were left out.

    Args:
        clock: seconds; never goes back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._second = -1
        self._written: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()

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
        if self._written[code] >= MAX_LINES_PER_SECOND:
            self._left_out[code] += 1
            return
        self._written[code] += 1
        left_out = self._left_out.pop(code, 0)
        if left_out:
            fields["left_out"] = left_out
        get_logger().info("refused", code=code, **fields)
