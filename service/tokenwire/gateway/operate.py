"""What an operator may do over HTTP."""

from __future__ import annotations

from tokenwire.errors import TokenwireError
from tokenwire.gateway.asgi import Receive, Scope, Send, respond
from tokenwire.gateway.context import Gateway
from tokenwire.observe.logging import get_logger


class Shutdown:
    """202, and the worker drains as after SIGTERM. Refused where nobody said that operators may come this way: without
    API keys anyone on the machine could, so it then takes an admin port that is open."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._gateway.stop is None:
            raise TokenwireError("PERMISSION_DENIED", "this server is not shut down over HTTP")
        client = scope.get("client")
        get_logger().warning("admin", action="shutdown", peer=f"{client[0]}:{client[1]}" if client else "unknown")
        await respond(send, 202, b'{"status":"draining"}')
        self._gateway.stop()
