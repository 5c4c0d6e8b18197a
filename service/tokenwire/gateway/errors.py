"""An error as HTTP carries it. Codes and statuses of a request's failure come from `tokenwire.errors`, the table that
gRPC uses too; `HTTP_ERRORS` adds what only HTTP can get wrong.

Two envelopes: ours, and OpenAI's below `/v1`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from tokenwire.errors import ERRORS, TokenwireError

MAX_VIOLATIONS = 16
MAX_DETAILS_BYTES = 4096


@dataclass(frozen=True, slots=True)
class HttpErrorClass:
    """One row: `message` is what the client reads unless the place that failed knows better."""

    code: str
    status: int
    message: str


_HTTP_ROWS = (
    HttpErrorClass("MALFORMED_HTTP", 400, "the request is not well-formed HTTP"),
    HttpErrorClass("ORIGIN_NOT_ALLOWED", 403, "pages of this origin may not call here"),
    HttpErrorClass("NOT_FOUND", 404, "there is nothing at this path"),
    HttpErrorClass("METHOD_NOT_ALLOWED", 405, "this path does not take this method"),
    HttpErrorClass("NOT_ACCEPTABLE", 406, "none of the accepted media types can be served"),
    HttpErrorClass("REQUEST_TIMEOUT", 408, "the request took too long to arrive"),
    HttpErrorClass("BODY_TOO_LARGE", 413, "the request body is too large"),
    HttpErrorClass("UNSUPPORTED_MEDIA_TYPE", 415, "the request body must be application/json, not encoded"),
    HttpErrorClass("HOST_NOT_ALLOWED", 421, "this server does not answer for that host"),
    HttpErrorClass("HEADERS_TOO_LARGE", 431, "the request's head is too large"),
)

HTTP_ERRORS: dict[str, HttpErrorClass] = {row.code: row for row in _HTTP_ROWS}

_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}


class HttpError(Exception):
    """A refusal that only HTTP knows.

    Args:
        code: a key of `HTTP_ERRORS`.
        headers: to send beside the answer.
    """

    def __init__(self, code: str, message: str | None = None, headers: dict[str, str] | None = None) -> None:
        row = HTTP_ERRORS[code]
        self.code = code
        self.message = message or row.message
        self.headers = headers or {}
        super().__init__(f"{code}: {self.message}")


Failure = TokenwireError | HttpError


def http_status(error: Failure) -> int:
    """The status line's number."""
    if isinstance(error, HttpError):
        return HTTP_ERRORS[error.code].status
    return ERRORS[error.code].http_status or 500


def headers(error: Failure) -> dict[str, str]:
    """Headers that belong to the error."""
    if isinstance(error, HttpError):
        return dict(error.headers)
    result = {}
    if error.retry_after_ms is not None:
        result["retry-after"] = str(max(1, math.ceil(error.retry_after_ms / 1000)))
    if error.code == "UNAUTHENTICATED":
        result["www-authenticate"] = 'Bearer realm="tokenwire"'
    return result


def body(error: Failure, correlation_id: str) -> bytes:
    """Our envelope."""
    content: dict[str, Any] = {
        "code": error.code,
        "message": error.message,
        "retriable": isinstance(error, TokenwireError) and error.retriable,
        "correlation_id": correlation_id,
    }
    details = _details(error)
    if details:
        content["details"] = details
    return json.dumps({"error": content}).encode()


def openai_body(error: Failure, correlation_id: str) -> bytes:
    """OpenAI's envelope: the first refused field is `param`; all of them are in `details`."""
    status = http_status(error)
    default = "server_error" if status >= 500 else "invalid_request_error"
    message, param = error.message, None
    if isinstance(error, TokenwireError) and error.fields:
        first = error.fields[0]
        param = first.field or None
        message = "; ".join(f"{field.field}: {field.message}".removeprefix(": ") for field in error.fields[:4])
        if len(error.fields) > 4:
            message += f"; and {len(error.fields) - 4} more"
    content: dict[str, Any] = {
        "message": message,
        "type": _OPENAI_TYPES.get(status, default),
        "param": param,
        "code": _openai_code(error),
        "correlation_id": correlation_id,
    }
    details = _details(error)
    if details:
        content["details"] = details
    return json.dumps({"error": content}).encode()


def _openai_code(error: Failure) -> str:
    """The first field's reason says more than INVALID_REQUEST where it names a rule of its own."""
    if isinstance(error, TokenwireError) and error.code == "INVALID_REQUEST" and error.fields:
        return error.fields[0].reason.lower()
    if isinstance(error, TokenwireError) and error.code == "NOT_FOUND":
        return "model_not_found"
    return error.code.lower()


def _details(error: Failure) -> dict[str, Any]:
    """At most `MAX_VIOLATIONS` fields in at most `MAX_DETAILS_BYTES`, as over gRPC."""
    if isinstance(error, HttpError):
        return {}
    details: dict[str, Any] = {}
    for name in ("limit", "actual", "phase", "quota", "cause"):
        value = getattr(error, name)
        if value is not None:
            details[name] = value
    if not error.fields:
        return details
    shown: list[dict[str, str]] = []
    room = MAX_DETAILS_BYTES - 256
    for violation in error.fields[:MAX_VIOLATIONS]:
        entry = {
            "field": violation.field[:256],
            "reason": violation.reason,
            "constraint": violation.constraint[:256],
            "message": violation.message[:256],
        }
        if violation.value is not None:
            entry["value"] = violation.value[:64]
        room -= len(json.dumps(entry)) + 2
        if room < 0:
            break
        shown.append(entry)
    details["fields"] = shown
    if len(shown) < len(error.fields):
        details["truncated"] = True
        details["violations"] = len(error.fields)
    return details
