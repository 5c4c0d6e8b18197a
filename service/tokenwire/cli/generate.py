"""`tokenwire generate`: one prompt, its answer streamed to stdout."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, TextIO

import typer

from tokenwire.cli import options
from tokenwire.cli.connection import Connection, with_connection
from tokenwire.cli.output import CliError, ExitCode, note, print_rpc_error, write_text
from tokenwire.client import (
    End,
    Event,
    Message,
    Metrics,
    ResponseFormat,
    SamplingParams,
    Token,
    TokenwireRpcError,
)


def generate(
    connection: Connection,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="The prompt; `-` reads it from stdin.", show_default=False)
    ],
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text; apply no chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="System message before the prompt.", metavar="TEXT")] = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    stop: options.Stop = None,
    seed: options.Seed = None,
    logprobs: options.Logprobs = None,
    json_schema: options.JsonSchema = None,
    regex: options.Regex = None,
    priority: options.Priority = None,
    cache_salt: options.CacheSalt = None,
    timeout: options.Timeout = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Go on if the connection breaks or the worker restarts.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print each event as a line of JSON.")] = False,
) -> None:
    """Stream an answer to stdout; a summary follows on stderr. Ctrl-C cancels."""
    if raw and system is not None:
        raise CliError("--system needs the chat template, which --raw leaves out", exit_code=ExitCode.USAGE)
    text = _read_stdin() if prompt == "-" else prompt
    params: SamplingParams = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "frequency_penalty": frequency_penalty,
        "presence_penalty": presence_penalty,
        "stop": stop,
        "seed": seed,
        "logprobs": logprobs,
        "priority": priority,
        "cache_salt": cache_salt,
        "response_format": _response_format(json_schema, regex),
    }
    messages: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": text})
    with connection.client(timeout) as client:
        # On a terminal the shell's prompt must not stick to the text; into a pipe goes the text alone.
        printer = JsonPrinter() if as_json else TextPrinter(end_line=sys.stdout.isatty())
        try:
            chat = None if raw else messages
            with client.execute(text if raw else None, messages=chat, detach=detach, **params) as stream:
                for event in stream:
                    printer.show(event)
        except TokenwireRpcError as error:
            printer.fail(error)
            print_rpc_error(error, connection.target)
            raise typer.Exit(ExitCode.FAILED) from None
        except KeyboardInterrupt:
            printer.interrupt()
            raise typer.Exit(ExitCode.INTERRUPTED) from None


app = options.command_app(with_connection(generate))


class TextPrinter:
    """The text alone on stdout, the summary on stderr.

    Args:
        end_line: whether text that does not end its last line gets a newline.
    """

    def __init__(self, end_line: bool) -> None:
        self._end_line = end_line
        self._begun_at = time.monotonic()
        self._first_token_ms: float | None = None
        self._tokens_per_second = 0.0
        self.text = ""

    def show(self, event: Event) -> None:
        if isinstance(event, Token):
            if self._first_token_ms is None:
                self._first_token_ms = (time.monotonic() - self._begun_at) * 1000
            self.text += event.text  # before it shows: an interrupt in between must not make it unseen
            write_text(event.text)
        elif isinstance(event, Metrics):
            self._tokens_per_second = event.tokens_per_second
        elif isinstance(event, End):
            self._close_line()
            note(self._summary(event))

    def fail(self, error: TokenwireRpcError) -> None:
        self._close_line()

    def interrupt(self) -> None:
        self._close_line()
        note("cancelled")

    def _close_line(self) -> None:
        if not self.text or self.text.endswith("\n"):
            return
        if self._end_line:
            write_text("\n")
        elif _same_file(sys.stdout, sys.stderr):
            note("")  # the answer stays as it is; what follows on stderr begins a line of its own

    def _summary(self, end: End) -> str:
        first = "-" if self._first_token_ms is None else f"{self._first_token_ms:.0f} ms"
        stop = {"eos": "end of answer", "max_tokens": "token limit", "stop_sequence": f"stop {end.stop_sequence!r}"}
        return (
            f"{end.tokens_out} tokens, TTFT {first}, {self._tokens_per_second:.1f} tokens/s, "
            f"stopped by {stop.get(end.stop_reason, end.stop_reason)}"
        )


class JsonPrinter:
    """Every event, the failure included, as a line of JSON on stdout."""

    def show(self, event: Event) -> None:
        self._write({"event": type(event).__name__.lower(), **dataclasses.asdict(event)})

    def fail(self, error: TokenwireRpcError) -> None:
        self._write(
            {
                "event": "error",
                "code": error.code,
                "message": error.message,
                "retriable": error.retriable,
                "retry_after_s": error.retry_after_s,
                "correlation_id": error.correlation_id,
                "fields": [dataclasses.asdict(violation) for violation in error.violations],
            }
        )

    def interrupt(self) -> None:
        self._write({"event": "error", "code": "CANCELLED", "message": "interrupted", "retriable": False})

    def _write(self, fields: dict[str, object]) -> None:
        print(json.dumps(fields, ensure_ascii=False, default=_json_value), flush=True)


def _same_file(first: TextIO, second: TextIO) -> bool:
    """Whether both write to one place, so that a line begun on one is continued by the other."""
    try:
        return os.path.sameopenfile(first.fileno(), second.fileno())
    except OSError:
        return False


def _json_value(value: object) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    isoformat = getattr(value, "isoformat", None)
    if isoformat is None:
        raise TypeError(f"{type(value).__name__} has no JSON form")
    return str(isoformat())


def _response_format(schema_file: Path | None, regex: str | None) -> ResponseFormat | None:
    if schema_file is not None and regex is not None:
        raise CliError("--json-schema and --regex exclude each other", exit_code=ExitCode.USAGE)
    if regex is not None:
        return {"regex": regex}
    if schema_file is None:
        return None
    try:
        return {"json_schema": schema_file.read_text(encoding="utf-8")}
    except OSError as error:
        raise CliError(f"{schema_file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CliError(f"{schema_file} is not UTF-8 text") from error


def _read_stdin() -> str:
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CliError(f"stdin is not UTF-8 text: {error.reason} at byte {error.start}") from error
