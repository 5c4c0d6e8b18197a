"""Every error a client can see, once: code, gRPC status, HTTP status, whether a retry can help, and the sentence.

The table is `ERRORS`; docs/errors.md shows it, and a test keeps the two equal. Nothing here knows gRPC: statuses are
names, and `rpc/status.py` turns an error into what travels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ErrorClass:
    """One row of the status table.

    Attributes:
        code: stable, upper case; `Error.code` in a stream and `ErrorInfo.reason` in a status.
        grpc_status: name of the gRPC status.
        http_status: the gateway's status; None where the error never reaches a client.
        retriable: whether the same request, unchanged, can succeed later.
        pushback: what `grpc-retry-pushback-ms` says: `after` a delay, `never`, or `none` (not sent).
        message: what the client reads unless the place that failed knows better.
        meaning: for docs/errors.md.
    """

    code: str
    grpc_status: str
    http_status: int | None
    retriable: bool
    pushback: str
    message: str
    meaning: str


_ROWS = (
    ErrorClass(
        "INVALID_REQUEST",
        "INVALID_ARGUMENT",
        400,
        False,
        "none",
        "the request is not valid",
        "A field is wrong; `BadRequest` names every one.",
    ),
    ErrorClass(
        "CONTEXT_LENGTH_EXCEEDED",
        "OUT_OF_RANGE",
        400,
        False,
        "none",
        "the prompt and the answer together exceed the context",
        "`ErrorInfo` carries `limit` and `actual`, in tokens.",
    ),
    ErrorClass(
        "UNAUTHENTICATED",
        "UNAUTHENTICATED",
        401,
        False,
        "none",
        "a valid credential is required",
        "No credential, or one that is not valid.",
    ),
    ErrorClass(
        "PERMISSION_DENIED",
        "PERMISSION_DENIED",
        403,
        False,
        "none",
        "this credential does not permit the call",
        "The credential is valid but not for this method.",
    ),
    ErrorClass("NOT_FOUND", "NOT_FOUND", 404, False, "none", "not found", "No such model, agent or job."),
    ErrorClass(
        "ALREADY_EXISTS",
        "ALREADY_EXISTS",
        409,
        False,
        "none",
        "a live job has this job_id",
        "The job id belongs to a job that is still live.",
    ),
    ErrorClass(
        "SLOW_CONSUMER",
        "ABORTED",
        409,
        False,
        "none",
        "the stream was not read for too long",
        "The client stopped reading its stream for longer than the worker waits.",
    ),
    ErrorClass(
        "OVERLOADED",
        "RESOURCE_EXHAUSTED",
        429,
        True,
        "after",
        "the queue is full",
        "Queue or rate limit; `RetryInfo` says when to try again.",
    ),
    ErrorClass(
        "KV_CAPACITY",
        "RESOURCE_EXHAUSTED",
        413,
        False,
        "never",
        "the request can never fit the KV pool",
        "Larger than the whole pool, so no wait helps and no `RetryInfo` is sent.",
    ),
    ErrorClass(
        "VRAM_OOM",
        "RESOURCE_EXHAUSTED",
        503,
        True,
        "none",
        "the device ran out of memory in a step",
        "This job failed; the worker lives on.",
    ),
    ErrorClass(
        "UNAVAILABLE",
        "UNAVAILABLE",
        503,
        True,
        "after",
        "the worker is not serving",
        "Loading, draining or swapping; `ErrorInfo` carries `phase`.",
    ),
    ErrorClass("CANCELLED", "CANCELLED", 499, False, "none", "the job was cancelled", "Cancelled by `Cancel`."),
    ErrorClass(
        "INFERENCE_TIMEOUT",
        "DEADLINE_EXCEEDED",
        504,
        True,
        "none",
        "the deadline passed before the job was done",
        "The call's deadline or the worker's inference timeout.",
    ),
    ErrorClass(
        "UNSUPPORTED_MODEL",
        "UNIMPLEMENTED",
        501,
        False,
        "none",
        "the model's architecture or format is not supported",
        "At start: the process exits with 1.",
    ),
    ErrorClass(
        "MODEL_LOAD_FAILED",
        "FAILED_PRECONDITION",
        None,
        False,
        "none",
        "the model cannot be loaded",
        "At start: one clear line, and the process exits with 1.",
    ),
    ErrorClass(
        "INSUFFICIENT_VRAM",
        "FAILED_PRECONDITION",
        None,
        False,
        "none",
        "the device has too little memory for the model",
        "At start: one clear line, and the process exits with 1.",
    ),
    ErrorClass(
        "CUDA_ERROR",
        "INTERNAL",
        500,
        True,
        "none",
        "the device failed",
        "Every stream ends, health stops serving, and the process exits.",
    ),
    ErrorClass("INTERNAL", "INTERNAL", 500, False, "none", "internal error", "A bug; the log has the correlation id."),
)

ERRORS: dict[str, ErrorClass] = {row.code: row for row in _ROWS}

RETRY_AFTER_MS = 1000
"""Delay suggested with a retriable refusal when the place that refused knows no better."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field that was refused.

    Attributes:
        field: its path, such as `temperature` or `chat.messages[2].role`.
        reason: the kind of rule, upper case, such as `RANGE`.
        constraint: the rule with its bounds, such as `range(0..=2)`.
        message: one sentence; never holds prompt or stop text.
        value: what was sent, for numbers only.
    """

    field: str
    reason: str
    constraint: str
    message: str
    value: str | None = None


class TokenwireError(Exception):
    """An error with a place in the table, safe to show to the client.

    Args:
        code: a key of `ERRORS`.
        message: one sentence; never holds request text, paths or addresses. Default: the table's.
        fields: every refused field, for INVALID_REQUEST.
        limit, actual: what was exceeded and by what, for CONTEXT_LENGTH_EXCEEDED and KV_CAPACITY.
        retry_after_ms: when a retry may help; default `RETRY_AFTER_MS` for codes that push back.
        phase: of the worker, for UNAVAILABLE.
        quota: which limit of use was reached, such as `requests_per_minute`, for OVERLOADED.
        cause: upper case, where one code has causes that a program may want to tell apart.
    """

    def __init__(
        self,
        code: str,
        message: str | None = None,
        *,
        fields: Iterable[FieldViolation] = (),
        limit: int | None = None,
        actual: int | None = None,
        retry_after_ms: int | None = None,
        phase: str | None = None,
        quota: str | None = None,
        cause: str | None = None,
    ) -> None:
        row = ERRORS[code]
        self.code = code
        self.message = message or row.message
        self.fields = tuple(fields)
        self.limit = limit
        self.actual = actual
        self.phase = phase
        self.quota = quota
        self.cause = cause
        self.retry_after_ms = (
            None if row.pushback != "after" else RETRY_AFTER_MS if retry_after_ms is None else retry_after_ms
        )
        super().__init__(f"{code}: {self.message}")

    @property
    def row(self) -> ErrorClass:
        return ERRORS[self.code]

    @property
    def retriable(self) -> bool:
        return self.row.retriable


class NoDeviceError(Exception):
    """The device that was asked for is not there. `str()` is one line for a person."""

    code = "NO_DEVICE"


def invalid_request(fields: Iterable[FieldViolation]) -> TokenwireError:
    """INVALID_REQUEST whose message counts and names the fields."""
    refused = tuple(fields)
    names = ", ".join(dict.fromkeys(violation.field for violation in refused[:4]))
    more = f" and {len(refused) - 4} more" if len(refused) > 4 else ""
    return TokenwireError("INVALID_REQUEST", f"the request is not valid: {names}{more}", fields=refused)


def from_engine_error(error: Exception) -> TokenwireError:
    """The client's view of an exception that the engine raised: its code if it is one of ours, else INTERNAL.

    Engine messages for INTERNAL and CUDA_ERROR may name places in the program, so those give way to the table's.
    """
    return from_outcome(str(getattr(error, "code", "")), str(error))


def from_outcome(code: str, message: str) -> TokenwireError:
    """The client's view of a job's failure."""
    if code not in ERRORS or code in ("INTERNAL", "CUDA_ERROR"):
        return TokenwireError(code if code in ERRORS else "INTERNAL")
    return TokenwireError(code, message)


def markdown_table() -> str:
    """The table as docs/errors.md shows it."""
    lines = ["| `Error.code` | gRPC status | HTTP | Retriable | Meaning |", "|---|---|---|---|---|"]
    for row in _ROWS:
        http = "–" if row.http_status is None else str(row.http_status)
        lines.append(
            f"| `{row.code}` | {row.grpc_status} | {http} | {'yes' if row.retriable else 'no'} | {row.meaning} |"
        )
    return "\n".join(lines) + "\n"
