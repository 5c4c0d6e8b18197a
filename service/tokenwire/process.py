"""A process of ours: the loop it runs on, the signals that end it, and the statuses it exits with."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from tokenwire.observe.log_file import flush_log_files

T = TypeVar("T")

EXIT_OK = 0
EXIT_START_FAILED = 1
EXIT_NO_DEVICE = 69
EXIT_ENGINE_FAILED = 70
EXIT_CANNOT_BIND = 71
EXIT_CONFIG = 78

Die = Callable[[int], object]


class StopSignals:
    """SIGTERM and SIGINT, counted: the first drains, the second ends the drain, a third ends the process."""

    def __init__(self, die: Die) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self._die = die

    def install(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.receive)

    def receive(self) -> None:
        if self.second.is_set():
            self._die(EXIT_START_FAILED)
        elif self.first.is_set():
            self.second.set()
        else:
            self.first.set()


def end_now(exit_status: int) -> None:
    """Ends the process without cleaning up, but for what it logged."""
    flush_log_files()
    os._exit(exit_status)


async def first_of(future: asyncio.Future[T], other: Coroutine[object, object, object]) -> None:
    """Waits until one of the two is done; `other` is cancelled if it is not."""
    waiting = asyncio.ensure_future(other)
    both: tuple[asyncio.Future[Any], ...] = (future, waiting)
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()


def run_loop(main: Coroutine[object, object, int]) -> int:
    """Runs to the end on the fastest event loop there is."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)
