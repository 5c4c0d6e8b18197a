"""What every command shares: where text goes, how a failure is reported, and the exit codes."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

    from tokenwire.client import TokenwireRpcError


class ExitCode(IntEnum):
    """The command's exit codes; `tokenwire --help` lists them."""

    OK = 0
    FAILED = 1
    USAGE = 2
    CONFIG = 78
    INTERRUPTED = 130


class CliError(Exception):
    """A failure to report: one line with the cause, one with the remedy where there is one.

    Args:
        cause: one sentence.
        remedy: what the user can do.
        exit_code: of the process.
    """

    def __init__(self, cause: str, remedy: str = "", exit_code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(cause)
        self.cause = cause
        self.remedy = remedy
        self.exit_code = exit_code


# All control characters but tab and newline. A model's text must not be able to command the terminal.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """The text as it may go to a terminal: control characters but tab and newline show as U+FFFD."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def write_text(text: str) -> None:
    """Writes generated text to stdout at once: exactly as it is, but to a terminal as `printable`."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def note(text: str) -> None:
    """Writes a line for the person, not the pipe: to stderr, dimmed on a terminal."""
    stderr_console().print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def print_facts(rows: Sequence[tuple[str, ...]], title: str = "") -> None:
    """Aligned rows on stdout, the first cell of each dimmed on a terminal."""
    console = _console(sys.stdout)
    if title:
        console.print(title, style="bold", markup=False, highlight=False)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [printable(cell).ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)]
        console.print(cells[0], style="dim", end="  ", markup=False, highlight=False, soft_wrap=True)
        console.print("  ".join(cells[1:]), markup=False, highlight=False, soft_wrap=True)


def stderr_console() -> Console:
    return _console(sys.stderr)


def _console(stream: TextIO) -> Console:
    from rich.console import Console  # here: a worker that starts well prints nothing through it

    return Console(file=stream)


def configure_streams() -> None:
    """A character that the terminal's encoding lacks becomes `?`; it never ends the command."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


def print_error(cause: str, remedy: str = "", details: Sequence[str] = ()) -> None:
    """`error: cause`, indented details, then what can be done."""
    console = stderr_console()
    console.print("error:", style="bold red", end=" ")
    for line in (printable(cause), *(f"  {printable(detail)}" for detail in details)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if remedy:
        console.print(f"hint: {remedy}", markup=False, highlight=False, soft_wrap=True)


def print_rpc_error(error: TokenwireRpcError, target: str) -> None:
    """A failed call: its code and message, every refused field, and what can be done."""
    details = [f"{violation.field}: {violation.description}" for violation in error.violations]
    if error.correlation_id:
        details.append(f"correlation id {error.correlation_id}")
    # Without a correlation id no worker has spoken, and gRPC's own text is long and says less.
    unreached = error.code == "UNAVAILABLE" and error.correlation_id is None
    message = f"no worker answers at {target}" if unreached else error.message
    print_error(f"{error.code}: {message}", _remedy(error, unreached), details)


def _remedy(error: TokenwireRpcError, unreached: bool) -> str:
    if unreached:
        return "start one with `tokenwire serve --model smollm2`, or name another with --target"
    if error.retry_after_s is not None:
        return f"try again in {error.retry_after_s:g} s"
    if error.code == "CONTEXT_LENGTH_EXCEEDED":
        return "shorten the prompt, or lower --max-tokens"
    return "try again" if error.retriable else ""
