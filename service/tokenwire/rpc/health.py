"""`grpc.health.v1.Health` over the worker's state.

The servicer of grpcio-health-checking is not used: its Watch holds a lock while it writes, so that one client that does
not read blocks every change of status, and the end of one Watch deafens the others of the same service.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

import grpc
from grpc_health.v1 import health_pb2

from tokenwire.errors import TokenwireError
from tokenwire.rpc.boundary import Context
from tokenwire.rpc.state import WorkerState

HEALTH_SERVICE_NAME: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


class HealthServicer:
    def __init__(self, state: WorkerState) -> None:
        self._state = state

    async def check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        response = self._response(request.service)
        if response.status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            raise TokenwireError("NOT_FOUND", "no such service")
        return response

    async def watch(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        """The status now and at every change, until the client leaves. A slow reader sees the latest only."""
        changed = self._state.watch()
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
            self._state.unwatch(changed)

    def _response(self, service: str) -> health_pb2.HealthCheckResponse:
        statuses = health_pb2.HealthCheckResponse
        serving = self._state.is_serving(service)
        if serving is None:
            return statuses(status=statuses.SERVICE_UNKNOWN)
        return statuses(status=statuses.SERVING if serving else statuses.NOT_SERVING)


def add_health(server: grpc.aio.Server, servicer: HealthServicer) -> None:
    handlers = {
        "Check": grpc.unary_unary_rpc_method_handler(
            servicer.check,
            request_deserializer=health_pb2.HealthCheckRequest.FromString,
            response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
        ),
        "Watch": grpc.unary_stream_rpc_method_handler(
            servicer.watch,
            request_deserializer=health_pb2.HealthCheckRequest.FromString,
            response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(HEALTH_SERVICE_NAME, handlers),))
