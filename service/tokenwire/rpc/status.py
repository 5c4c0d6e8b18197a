"""An error as gRPC carries it: status, `google.rpc` details and trailers, kept small enough to arrive.

gRPC drops the real status of a reply whose metadata outgrows 8 KiB, so details stop at `MAX_DETAILS_BYTES` and say so
with `truncated` in the ErrorInfo.
"""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from tokenwire.errors import TokenwireError

ERROR_DOMAIN = "tokenwire"
MAX_VIOLATIONS = 16
MAX_DETAILS_BYTES = 4096

# Room for the parts of the status around the violations: code, message, ErrorInfo, RetryInfo.
_MAX_VIOLATION_BYTES = MAX_DETAILS_BYTES - 1024
_MAX_TEXT_BYTES = 256

PUSHBACK_KEY = "grpc-retry-pushback-ms"


def to_proto(error: TokenwireError) -> status_pb2.Status:
    """The `google.rpc.Status` of an error, at most `MAX_DETAILS_BYTES` long."""
    details: list[any_pb2.Any] = []
    info = error_details_pb2.ErrorInfo(reason=error.code, domain=ERROR_DOMAIN)
    info.metadata["retriable"] = "true" if error.retriable else "false"
    facts = ("limit", "actual", "phase", "quota", "cause")
    for key, value in ((name, getattr(error, name)) for name in facts):
        if value is not None:
            info.metadata[key] = _clip(str(value))
    if error.fields:
        bad_request, complete = _bad_request(error)
        if not complete:
            info.metadata["truncated"] = "true"
            info.metadata["violations"] = str(len(error.fields))
        details.append(_pack(bad_request))
    details.append(_pack(info))
    if error.quota is not None:
        reached = error_details_pb2.QuotaFailure.Violation(subject=error.quota, description=_clip(error.message))
        details.append(_pack(error_details_pb2.QuotaFailure(violations=[reached])))
    if error.retry_after_ms is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(error.retry_after_ms)
        details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status_pb2.Status(
        code=code_pb2.Code.Value(error.row.grpc_status), message=_clip(error.message), details=details
    )


def to_abort(error: TokenwireError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str | bytes], ...]]:
    """What `ServicerContext.abort` needs: status code, message and trailing metadata."""
    status = rpc_status.to_status(to_proto(error))
    trailers: list[tuple[str, str | bytes]] = list(status.trailing_metadata)
    if error.row.pushback == "after":
        trailers.append((PUSHBACK_KEY, str(error.retry_after_ms)))
    elif error.row.pushback == "never":
        trailers.append((PUSHBACK_KEY, "-1"))
    return status.code, status.details, tuple(trailers)


def _bad_request(error: TokenwireError) -> tuple[error_details_pb2.BadRequest, bool]:
    result = error_details_pb2.BadRequest()
    for violation in error.fields[:MAX_VIOLATIONS]:
        entry = error_details_pb2.BadRequest.FieldViolation(
            field=_clip(violation.field), description=_clip(violation.message), reason=violation.reason
        )
        if result.ByteSize() + entry.ByteSize() + 4 > _MAX_VIOLATION_BYTES:
            return result, False
        result.field_violations.append(entry)
    return result, len(error.fields) <= MAX_VIOLATIONS


def _clip(text: str) -> str:
    data = text.encode("utf-8", "replace")
    return data[:_MAX_TEXT_BYTES].decode("utf-8", "ignore")


def _pack(detail: message.Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
