"""Logging: one structured line an event, JSON for machines, console for people.

Events say what happened (`execute_start`), fields say the numbers. Prompts, outputs and stop strings are never logged.
Context bound by `bind_context` (worker_id, model, device, correlation_id, job_id) is on every line of its task.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, MutableMapping
from typing import IO, Any

import structlog

from tokenwire.observe.redaction import redact

Logger = structlog.stdlib.BoundLogger


def configure_logging(level: str, log_format: str, stream: IO[str] | None = None) -> None:
    """Routes structlog and the standard library's loggers to `stream` (default: stderr).

    Args:
        level: `debug`, `info`, `warning` or `error`.
        log_format: `json`, `console`, or `auto` for console on a terminal and JSON elsewhere.
    """
    stream = sys.stderr if stream is None else stream
    as_json = log_format == "json" or (log_format == "auto" and not stream.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if as_json:
        # json.dumps escapes every control character, which keeps one event on one line.
        rendering: list[structlog.typing.Processor] = [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ]
    else:
        rendering = [_escape_control, structlog.dev.ConsoleRenderer(colors=stream.isatty())]

    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        _RedactingFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.getLogger("asyncio").setLevel(max(root.level, logging.WARNING))
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=Logger,
        cache_logger_on_first_use=False,
    )


class _RedactingFormatter(structlog.stdlib.ProcessorFormatter):
    """Works on the finished line, so that no field, traceback or library gets around it."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def get_logger() -> Logger:
    logger: Logger = structlog.get_logger("tokenwire")
    return logger


def bind_context(**fields: str) -> None:
    """Adds fields to every later line of this task and of tasks it starts."""
    structlog.contextvars.bind_contextvars(**fields)


def reset_context(keep: Mapping[str, str] | None = None) -> None:
    """Forgets the task's context except `keep`."""
    structlog.contextvars.clear_contextvars()
    if keep:
        structlog.contextvars.bind_contextvars(**keep)


def _escape_control(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Keeps text from clients from starting a line or colouring a terminal."""
    for key, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[key] = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)
    return event
