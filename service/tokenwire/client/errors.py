"""How a failed call looks to the caller: one exception, decoded from the status and its google.rpc details."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from tokenwire.v1 import inference_pb2 as pb

_DETAILS_KEY = "grpc-status-details-bin"
_CORRELATION_KEY = "x-correlation-id"
_PUSHBACK_KEY = "grpc-retry-pushback-ms"

# A pair of call metadata as grpcio gives it: text, or bytes for keys that end in `-bin`.
Metadata = Iterable[tuple[str, str | bytes]]


@dataclass(frozen=True)
class FieldViolation:
    """One field of the request that the worker refused, and why."""

    field: str
    description: str
    reason: str


@dataclass(frozen=True)
class ResumePoint:
    """Where a stream that failed can be taken up.

    Attributes:
        from_index: index after the last token that came.
        digest: `Token.digest` of that token's event; empty if none came.
    """

    from_index: int
    digest: str


class TokenwireRpcError(Exception):
    """A call that failed.

    Attributes:
        code: the stable upper-case code (docs/errors.md), or the name of the gRPC status where the worker gave none.
        message: one sentence for a person.
        status: the gRPC status.
        violations: every field that was refused; empty if the request's fields were not the cause.
        retriable: whether the same request can succeed later without a change.
        retry_after_s: seconds to wait before a retry, if the worker named them.
        correlation_id: names this call in the worker's log; None if the worker was never reached.
        from_worker: whether the worker itself answered; False if the connection failed.
        pushed_back: whether the worker asked not to be tried again.
        metadata: further facts, such as `limit` and `actual` of a request beyond the context.
        resume: where the stream can be taken up, if the worker ended it early and it can.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        status: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        violations: tuple[FieldViolation, ...] = (),
        retriable: bool = False,
        retry_after_s: float | None = None,
        correlation_id: str | None = None,
        from_worker: bool = False,
        pushed_back: bool = False,
        metadata: Mapping[str, str] | None = None,
        resume: ResumePoint | None = None,
    ) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.status = status
        self.violations = violations
        self.retriable = retriable
        self.retry_after_s = retry_after_s
        self.correlation_id = correlation_id
        self.from_worker = from_worker
        self.pushed_back = pushed_back
        self.metadata = dict(metadata or {})
        self.resume = resume

    def __str__(self) -> str:
        fields = "".join(f"; {violation.field}: {violation.description}" for violation in self.violations)
        return f"{self.code}: {self.message}{fields}"


def error_from_status(
    status: grpc.StatusCode,
    message: str | None,
    initial_metadata: Metadata | None,
    trailing_metadata: Metadata | None,
    event: pb.Error | None = None,
) -> TokenwireRpcError:
    """Builds the exception of a failed call.

    Args:
        status, message: the call's final status.
        initial_metadata, trailing_metadata: the call's metadata, as far as it was received.
        event: the stream's `error` event, if it had one; it knows best.
    """
    initial = list(initial_metadata or ())
    trailing = list(trailing_metadata or ())
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    bad_request = error_details_pb2.BadRequest()
    for detail in _details(trailing):
        for known in (info, retry, bad_request):
            if detail.Is(known.DESCRIPTOR):
                detail.Unpack(known)
    retry_after_s = retry.retry_delay.ToTimedelta().total_seconds() if retry.HasField("retry_delay") else None
    pushback_ms = _pushback_ms(trailing)
    resume = None
    if event is not None and event.HasField("resume"):
        resume = ResumePoint(event.resume.from_index, event.resume.digest)
    if retry_after_s is None and pushback_ms is not None and pushback_ms >= 0:
        retry_after_s = pushback_ms / 1000
    return TokenwireRpcError(
        code=(event.code if event is not None else "") or info.reason or status.name,
        message=(event.message if event is not None else "") or message or "the call failed without a message",
        status=status,
        violations=tuple(
            FieldViolation(violation.field, violation.description, violation.reason)
            for violation in bad_request.field_violations
        ),
        retriable=event.retriable
        if event is not None
        else retry_after_s is not None or status is grpc.StatusCode.UNAVAILABLE,
        retry_after_s=retry_after_s,
        correlation_id=_correlation_id(trailing) or _correlation_id(initial),
        from_worker=event is not None or bool(info.reason),
        pushed_back=pushback_ms is not None and pushback_ms < 0,
        metadata=info.metadata,
        resume=resume,
    )


def error_from_event(event: pb.Error) -> TokenwireRpcError:
    """The exception of a stream that ended in an `error` event and gave no other status."""
    return error_from_status(grpc.StatusCode.UNKNOWN, None, None, None, event)


def error_from_call(call: Any, event: pb.Error | None = None) -> TokenwireRpcError:
    # grpcio's blocking exceptions are the call itself: they carry the status and the metadata.
    return error_from_status(call.code(), call.details(), call.initial_metadata(), call.trailing_metadata(), event)


def error_from_rpc(error: grpc.aio.AioRpcError, event: pb.Error | None = None) -> TokenwireRpcError:
    return error_from_status(error.code(), error.details(), error.initial_metadata(), error.trailing_metadata(), event)


def _pushback_ms(trailing: Metadata) -> int | None:
    """When the worker wants to be tried again, milliseconds; negative for never, and so is what is no number."""
    for key, value in trailing:
        if key == _PUSHBACK_KEY:
            try:
                return int(value)
            except ValueError:
                return -1
    return None


def _details(trailing: Metadata) -> list[any_pb2.Any]:
    for key, value in trailing:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return list(status_pb2.Status.FromString(value).details)
            except DecodeError:  # a proxy damaged them; the status itself still holds
                return []
    return []


def _correlation_id(metadata: Metadata) -> str | None:
    return next((value for key, value in metadata if key == _CORRELATION_KEY and isinstance(value, str)), None)
