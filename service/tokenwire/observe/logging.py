"""Logging: one structured line an event, JSON for machines, console for people.

Events say what happened (`execute_start`), fields say the numbers. Prompts, outputs and stop strings are never logged.
Context bound by `bind_context` (worker_id, model, device, correlation_id, job_id) is on every line of its task.
"""

from __future__ import annotations

import functools
import logging
import sys
import traceback
from collections.abc import Mapping, MutableMapping
from typing import IO, Any, TextIO

from tokenwire.observe.imports import without
from tokenwire.observe.log_file import LogFile
from tokenwire.observe.redaction import redact

with without("rich"):  # an eighth of all imports of a start, for a kind of traceback that no line of ours has
    import structlog

Logger = structlog.stdlib.BoundLogger


def configure_logging(
    level: str, log_format: str, stream: IO[str] | None = None, log_file: LogFile | None = None
) -> None:
    """Routes structlog and the standard library's loggers.

    Args:
        level: `debug`, `info`, `warning` or `error`.
        log_format: `json`, `console`, or `auto` for console on a terminal and JSON elsewhere.
        stream: where to; default: stderr.
        log_file: everything goes there, and errors to the stream as well.
    """
    stream = sys.stderr if stream is None else stream
    to_stream = logging.StreamHandler(stream)
    to_stream.setFormatter(_formatter(log_format, is_terminal=stream.isatty()))
    handlers: list[logging.Handler] = [to_stream]
    if log_file is not None:
        log_file.setFormatter(_formatter(log_format, is_terminal=False))
        to_stream.setLevel(logging.ERROR)
        handlers.append(log_file)
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level.upper())
    logging.getLogger("asyncio").setLevel(max(root.level, logging.WARNING))
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_context_processors(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=Logger,
        cache_logger_on_first_use=False,
    )
    get_logger.cache_clear()
    # No line says where in the code it was written, or in which thread: not finding that out saves a fifth of its cost.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


def _context_processors() -> list[structlog.typing.Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]


def _formatter(log_format: str, *, is_terminal: bool) -> logging.Formatter:
    if log_format == "json" or (log_format == "auto" and not is_terminal):
        # json.dumps escapes every control character, which keeps one event on one line.
        rendering: list[structlog.typing.Processor] = [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ]
    else:
        console = structlog.dev.ConsoleRenderer(colors=is_terminal, exception_formatter=_write_exception)
        rendering = [_escape_control, console]
    return _RedactingFormatter(
        foreign_pre_chain=_context_processors(),
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
    )


class _RedactingFormatter(structlog.stdlib.ProcessorFormatter):
    """Works on the finished line, so that no field, traceback or library gets around it."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


@functools.cache
def get_logger() -> Logger:
    # Bound once: what structlog returns would be bound anew for every line.
    logger: Logger = structlog.get_logger("tokenwire").bind()
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
        if isinstance(value, str):
            event[key] = _printable(value)
    return event


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _write_exception(out: TextIO, exception: structlog.typing.ExcInfo) -> None:
    """A traceback without the values of variables, which may be a prompt; its lines are indented, so that none that an
    exception's message begins can pass for an event."""
    for line in "".join(traceback.format_exception(*exception)).splitlines():
        out.write("\n    " + _printable(line))
