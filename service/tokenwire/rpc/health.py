"""`grpc.health.v1.Health` over the worker's state.

The servicer of grpcio-health-checking is not used: its Watch holds a lock while it writes, so that one client that does
not read blocks every change of status, and the end of one Watch deafens the others of the same service.

Check is answered beside the boundary and the guard: what they do around a call costs several times what the call does,
and probes come many at a time, while the processors compute. It is public, so that the guard has no say; what is not a
well-formed question about a service that there is goes through the boundary like any other call.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from tokenwire.errors import TokenwireError
from tokenwire.observe.metrics import OK
from tokenwire.rpc.boundary import CORRELATION_KEYS, Boundary, Context, correlation_id
from tokenwire.rpc.layers import Registry
from tokenwire.rpc.state import SERVICES, WorkerState

HEALTH_SERVICE_NAME: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

_QUESTIONS = {health_pb2.HealthCheckRequest(service=name).SerializeToString(): name for name in SERVICES}
_ANSWERS = {
    serving: health_pb2.HealthCheckResponse(status=status).SerializeToString()
    for serving, status in (
        (True, health_pb2.HealthCheckResponse.SERVING),
        (False, health_pb2.HealthCheckResponse.NOT_SERVING),
    )
}


class HealthServicer:
    """Handlers of the service.

    Args:
        boundary: what all other calls go through.
    """

    def __init__(self, state: WorkerState, boundary: Boundary) -> None:
        self._state = state
        self._check_in_full = boundary.unary("Check", self._check, health_pb2.HealthCheckRequest.FromString)

    async def check(self, data: bytes, context: Context) -> Any:
        """A serialised answer to a serialised question."""
        service = _QUESTIONS.get(data)
        if service is None:
            return await self._check_in_full(data, context)
        serving = self._state.is_serving(service)
        # In the trailing metadata alone: to send initial metadata first would be a round through the loop of its own.
        context.set_trailing_metadata(((CORRELATION_KEYS[0], correlation_id(context.invocation_metadata())),))
        self._state.metrics.call_ended("Check", OK)
        return _ANSWERS[bool(serving)]

    async def _check(self, request: health_pb2.HealthCheckRequest, context: Context) -> bytes:
        response = self._response(request.service)
        if response.status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            raise TokenwireError("NOT_FOUND", "no such service")
        return bytes(response.SerializeToString())

    async def watch(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        """The status now and at every change, until the client leaves. A slow reader sees the latest only."""
        changed = asyncio.Event()
        self._state.watch(changed.set)
        try:
            last = None
            while True:
                changed.clear()
                response = self._response(request.service)
                if response != last:
                    last = response
                    yield response
                await changed.wait()
        finally:
            self._state.unwatch(changed.set)

    def _response(self, service: str) -> health_pb2.HealthCheckResponse:
        statuses = health_pb2.HealthCheckResponse
        serving = self._state.is_serving(service)
        if serving is None:
            return statuses(status=statuses.SERVICE_UNKNOWN)
        return statuses(status=statuses.SERVING if serving else statuses.NOT_SERVING)


def add_health(server: Registry, layered: Registry, servicer: HealthServicer) -> None:
    """Registers Check with the server itself, and Watch inside of its layers."""
    check: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(
        servicer.check, request_deserializer=None, response_serializer=None
    )
    watch: grpc.RpcMethodHandler[Any, Any] = grpc.unary_stream_rpc_method_handler(
        servicer.watch,
        request_deserializer=health_pb2.HealthCheckRequest.FromString,
        response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
    )
    for registry, handlers in ((server, {"Check": check}), (layered, {"Watch": watch})):
        registry.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(HEALTH_SERVICE_NAME, handlers),))
