"""The boundary around every handler of the server: what comes in malformed, and what goes wrong inside, turns into a
typed status here, and nowhere else.

- A message that does not parse becomes INVALID_ARGUMENT; left alone, grpc.aio answers UNKNOWN with the parser's text.
- `TokenwireError` becomes its status with details. Any other exception becomes INTERNAL with a fixed sentence, and
  its traceback goes to the log only.
- Every answer carries `x-correlation-id`: in the initial metadata once a call produces an answer, and always in the
  trailing metadata. A refusal sends no initial metadata, since a client may transparently retry only without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from tokenwire.errors import FieldViolation, TokenwireError, invalid_request
from tokenwire.observe.collect import WorkerMetrics
from tokenwire.observe.logging import bind_context, get_logger
from tokenwire.observe.metrics import DISCONNECTED, OK
from tokenwire.observe.refusals import RefusalLog
from tokenwire.rpc import status

CORRELATION_KEYS = ("x-correlation-id", "x-request-id")
_CORRELATION_ID = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)

# grpc's own handler types are untyped; `Any` stands for a message of whichever method is wrapped.
Handler = Callable[[Any, Any], Any]
if TYPE_CHECKING:
    RpcHandler = grpc.RpcMethodHandler[Any, Any]
    Context = grpc.aio.ServicerContext[Any, Any]
else:
    Context = grpc.aio.ServicerContext


class _Malformed:
    """Stands for a request that did not parse."""


_MALFORMED = _Malformed()


def correlation_id(metadata: Any) -> str:
    """The caller's correlation id if it sent a well-formed one, else a new one."""
    sent = {key: value for key, value in reversed(tuple(metadata or ())) if key in CORRELATION_KEYS}
    for key in CORRELATION_KEYS:
        value = sent.get(key)
        if isinstance(value, str) and _CORRELATION_ID.fullmatch(value):
            return value
    return str(uuid.uuid4())


class Boundary:
    """The outermost of a server's layers.

    Args:
        metrics: counts every call that ends.
        refusals: writes down every call that is refused.
    """

    def __init__(self, metrics: WorkerMetrics, refusals: RefusalLog) -> None:
        self._metrics = metrics
        self._refusals = refusals

    def unary(self, method: str, handler: Handler, deserialize: Callable[[bytes], Any]) -> Handler:
        """What `wrap` makes of a handler, for a method that is not always wrapped. Takes the message's bytes; the
        handler's answer is returned as it is."""
        parse = _guarded_deserializer(deserialize)

        async def run(data: bytes, context: Any) -> Any:
            call_id = correlation_id(context.invocation_metadata())
            call = _Call(self._metrics, self._refusals, method, call_id)
            return await _unary(call, handler)(parse(data), context)

        return run

    def wrap(self, handler: RpcHandler, details: grpc.HandlerCallDetails) -> RpcHandler:
        method = details.method.rpartition("/")[2]
        call = _Call(self._metrics, self._refusals, method, correlation_id(details.invocation_metadata))
        deserialize = _guarded_deserializer(handler.request_deserializer)
        serialize = handler.response_serializer
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                _streaming(call, handler.stream_stream), deserialize, serialize
            )
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(_streaming(call, handler.unary_stream), deserialize, serialize)
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(_unary(call, handler.unary_unary), deserialize, serialize)
        raise NotImplementedError("no service here takes a stream and answers once")


def _guarded_deserializer(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    def guarded(data: bytes) -> Any:
        try:
            return data if deserialize is None else deserialize(data)
        except (DecodeError, ValueError, RecursionError):
            return _MALFORMED

    return guarded


def _require_parsed(request: Any) -> None:
    if request is _MALFORMED:
        message = "the message is not a valid encoding of its type"
        raise invalid_request([FieldViolation("", "MALFORMED_PROTO", "valid_proto", message)])


async def _parsed(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        _require_parsed(request)
        yield request


class _Call:
    """One call, from its arrival."""

    def __init__(self, metrics: WorkerMetrics, refusals: RefusalLog, method: str, call_id: str) -> None:
        self.metrics = metrics
        self.refusals = refusals
        self.method = method
        self.correlation = ((CORRELATION_KEYS[0], call_id),)
        self.call_id = call_id
        self.committed = False


def _unary(call: _Call, handler: Handler) -> Handler:
    async def run(request: Any, context: Any) -> Any:
        async with _translated(call, context):
            _require_parsed(request)
            response = await handler(request, context)
            await context.send_initial_metadata(call.correlation)
            return response

    return run


def _streaming(call: _Call, handler: Handler) -> Handler:
    """Handlers are asynchronous generators; the first thing they yield commits the call."""

    async def run(request: Any, context: Any) -> None:
        async with _translated(call, context):
            if hasattr(request, "__aiter__"):
                request = _parsed(request)
            else:
                _require_parsed(request)
            async with contextlib.aclosing(handler(request, context)) as messages:
                async for message in messages:
                    if not call.committed:
                        call.committed = True
                        await context.send_initial_metadata(call.correlation)
                    await context.write(message)

    return run


@contextlib.asynccontextmanager
async def _translated(call: _Call, context: Any) -> AsyncIterator[None]:
    bind_context(correlation_id=call.call_id)
    context.set_trailing_metadata(call.correlation)
    began = time.monotonic()
    code = "INTERNAL"
    try:
        yield
        code = OK
        return
    except TokenwireError as error:
        failure = error
        code = error.code
    except asyncio.CancelledError:
        code = "INFERENCE_TIMEOUT" if is_past_deadline(context) else DISCONNECTED
        raise
    except grpc.aio.AbortError:
        raise
    except Exception:
        # A client that left makes writes fail; that is its choice and no fault of ours.
        if context.done():
            code = DISCONNECTED
            raise
        get_logger().error("error", code=code, method=call.method, exc_info=True)
        failure = TokenwireError("INTERNAL")
    finally:
        call.metrics.call_ended(call.method, code)
    if not call.committed:
        wall_ms = round((time.monotonic() - began) * 1000, 1)
        call.refusals.note(code, method=call.method, peer=context.peer(), wall_ms=wall_ms)
    status_code, message, trailers = status.to_abort(failure)
    await context.abort(status_code, message, (*trailers, *call.correlation))


def time_remaining(context: Context) -> float | None:
    """Seconds to the call's deadline; None if it has none, which the type stubs of gRPC leave out."""
    return context.time_remaining()


def is_past_deadline(context: Context) -> bool:
    left_s = time_remaining(context)
    return left_s is not None and left_s <= 0
