"""Refused calls in the log: each is a line or is counted in one (A-3, A-7)."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from tokenwire.observe import refusals as module
from tokenwire.observe.logging import bind_context, configure_logging, reset_context
from tokenwire.observe.refusals import MAX_LINES_PER_SECOND, RefusalLog


class Clock:
    def __init__(self) -> None:
        self.now = 7.9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    configure_logging("info", "json", stream)
    yield stream
    reset_context()
    root.handlers[:] = handlers
    root.setLevel(level)


def lines_of(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


async def test_a_second_has_so_many_lines_of_a_code_and_one_that_counts_the_rest(written: io.StringIO) -> None:
    clock = Clock()
    log = RefusalLog(clock)
    for code in ("UNAUTHENTICATED", "OVERLOADED"):
        for _ in range(MAX_LINES_PER_SECOND + 5):
            log.note(code, method="Execute")
    clock.now = 8.0
    log.note("OVERLOADED", method="Execute")
    assert len(lines_of(written)) == 2 * MAX_LINES_PER_SECOND + 1
    log.flush()
    log.flush()
    rest = [(line["code"], line["left_out"]) for line in lines_of(written) if "left_out" in line]
    assert rest == [("UNAUTHENTICATED", 5), ("OVERLOADED", 5)]


async def test_what_is_left_out_is_told_though_nothing_follows(
    written: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SUMMARY_S", 0.01)
    bind_context(worker_id="w")
    log = RefusalLog(Clock())

    async def call() -> None:  # a task has a context of its own, as a call has
        bind_context(correlation_id="of-a-call")
        for _ in range(MAX_LINES_PER_SECOND + 3):
            log.note("UNAUTHENTICATED")

    await asyncio.create_task(call())
    for _ in range(500):
        await asyncio.sleep(0.01)
        *calls, last = lines_of(written)
        if "left_out" in last:
            break
    assert last.pop("timestamp")
    assert last == {"event": "refused", "level": "info", "worker_id": "w", "code": "UNAUTHENTICATED", "left_out": 3}
    assert {line["correlation_id"] for line in calls} == {"of-a-call"}
