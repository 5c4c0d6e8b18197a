"""Logging: one line an event, whatever is in it; context on every line; other libraries' lines alike."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from tokenwire.observe.logging import bind_context, configure_logging, get_logger, reset_context

HOSTILE = "a\nlevel=error forged\r\x1b[31mred\u2028x\x00"


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    reset_context()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_one_event_is_one_line(log_format: str) -> None:
    stream = io.StringIO()
    configure_logging("info", log_format, stream)
    get_logger().info("cancel", job_id=HOSTILE)
    get_logger().info(HOSTILE)
    logging.getLogger("other").warning("%s", HOSTILE)
    text = stream.getvalue()
    assert len(text.splitlines()) == 3
    assert "\x1b[31m" not in text


def test_json_lines_carry_level_time_event_and_context() -> None:
    stream = io.StringIO()
    configure_logging("info", "json", stream)
    bind_context(worker_id="w", job_id="j")
    get_logger().info("execute_end", tokens_out=3)
    line = json.loads(stream.getvalue())
    assert line.pop("timestamp").endswith("Z")
    assert line == {"event": "execute_end", "level": "info", "worker_id": "w", "job_id": "j", "tokens_out": 3}


def test_a_traceback_stays_inside_its_line() -> None:
    stream = io.StringIO()
    configure_logging("info", "json", stream)
    try:
        raise ValueError("inner")
    except ValueError:
        get_logger().error("error", exc_info=True)
    assert "ValueError: inner" in json.loads(stream.getvalue())["exception"]


def test_less_severe_events_are_dropped() -> None:
    stream = io.StringIO()
    configure_logging("warning", "json", stream)
    get_logger().info("execute_start")
    get_logger().warning("cancel")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["cancel"]


def test_auto_is_json_where_nobody_watches() -> None:
    stream = io.StringIO()
    configure_logging("info", "auto", stream)
    get_logger().info("ready")
    assert json.loads(stream.getvalue())["event"] == "ready"


def test_a_console_traceback_shows_no_values_and_no_line_that_could_pass_for_an_event() -> None:
    stream = io.StringIO()
    configure_logging("info", "console", stream)

    def fails(prompt: str) -> None:
        raise ValueError(f"odd{HOSTILE}")

    try:
        fails("the SECRET prompt".lower())
    except ValueError:
        get_logger().error("error", exc_info=True)
    first, *rest = stream.getvalue().splitlines()
    assert "error" in first
    assert all(line.startswith("    ") for line in rest if line)
    assert "secret prompt" not in stream.getvalue()
    assert "\x1b[31m" not in stream.getvalue()
