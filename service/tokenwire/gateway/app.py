"""The gateway's paths, and the layers in front of them."""

from __future__ import annotations

from collections.abc import Callable

from starlette.routing import Route, Router

from tokenwire.gateway.asgi import App, Receive, Scope, Send
from tokenwire.gateway.context import Gateway
from tokenwire.gateway.errors import HttpError
from tokenwire.gateway.execute import Cancel, Execute
from tokenwire.gateway.guards import Accepts, Errors, Hosts, Origins, with_app
from tokenwire.gateway.health import Health, Live, Ready, Startup

Layer = Callable[[App], App]


def build_app(gateway: Gateway, protection: Layer | None = None) -> App:
    """The ASGI application.

    Args:
        protection: authentication and rate limits; what it refuses, it raises as TokenwireError.
    """
    return _with_layers(with_app(_router(gateway)), gateway, protection)


def _with_layers(app: App, gateway: Gateway, protection: Layer | None) -> App:
    """Outermost last."""
    app = Accepts(app)
    if protection is not None:
        app = protection(app)
    app = Origins(app, gateway.settings)
    app = Hosts(app, gateway.settings)
    return Errors(app)


def _router(gateway: Gateway) -> Router:
    execute = Execute(gateway)
    return Router(
        [
            Route("/execute", execute, methods=["POST"]),
            Route("/v2/execute", execute, methods=["POST"]),
            Route("/cancel", Cancel(gateway), methods=["POST"]),
            Route("/health", Health(gateway), methods=["GET"]),
            Route("/health/live", Live(), methods=["GET"]),
            Route("/health/ready", Ready(gateway), methods=["GET"]),
            Route("/health/startup", Startup(gateway), methods=["GET"]),
        ],
        redirect_slashes=False,
        default=_nothing_here,
    )


async def _nothing_here(scope: Scope, receive: Receive, send: Send) -> None:
    raise HttpError("NOT_FOUND")
