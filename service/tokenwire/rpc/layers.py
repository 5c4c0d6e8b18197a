"""What stands around the handlers of a server, put around each when it is called.

gRPC's own interceptors do the same as coroutines, for every method of a server: a quarter of what a short call costs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import grpc

if TYPE_CHECKING:
    RpcHandler = grpc.RpcMethodHandler[Any, Any]


class Layer(Protocol):
    def wrap(self, handler: RpcHandler, details: grpc.HandlerCallDetails) -> RpcHandler:
        """The handler of one call, with what this layer does around it. Never raises: a refusal is a handler too."""


class Registry(Protocol):
    """Where services are added: a server, or `Layered` in front of one."""

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Iterable[grpc.GenericRpcHandler], /) -> None: ...


class Layered:
    """Adds services to a server whose handlers stand inside of layers.

    Args:
        layers: the outermost first.
    """

    def __init__(self, server: grpc.aio.Server, *layers: Layer) -> None:
        self._server = server
        self._layers = layers

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Iterable[grpc.GenericRpcHandler], /) -> None:
        wrapped = tuple(_Wrapped(handler, self._layers) for handler in generic_rpc_handlers)
        self._server.add_generic_rpc_handlers(wrapped)


class _Wrapped(grpc.GenericRpcHandler):
    def __init__(self, inner: grpc.GenericRpcHandler, layers: tuple[Layer, ...]) -> None:
        self._inner = inner
        self._from_inside = layers[::-1]

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> RpcHandler | None:
        handler = self._inner.service(handler_call_details)
        if handler is not None:
            for layer in self._from_inside:
                handler = layer.wrap(handler, handler_call_details)
        return handler
