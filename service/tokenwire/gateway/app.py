"""The gateway's paths, and the layers in front of them."""

from __future__ import annotations

from collections.abc import Callable

from starlette.routing import Route, Router

from tokenwire.gateway.asgi import App, Receive, Scope, Send
from tokenwire.gateway.context import Gateway
from tokenwire.gateway.errors import HttpError
from tokenwire.gateway.execute import Attach, Cancel, Execute
from tokenwire.gateway.guards import Accepts, Errors, Hosts, Origins, with_app
from tokenwire.gateway.health import Health, Live, Ready, Startup
from tokenwire.gateway.metrics import MetricsPage
from tokenwire.gateway.openai.endpoints import Completions, Models
from tokenwire.gateway.openai.request import parse_chat, parse_completion
from tokenwire.gateway.openapi import OpenApi
from tokenwire.gateway.operate import Shutdown
from tokenwire.gateway.page_files import page_routes

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
    execute, models = Execute(gateway), Models(gateway)
    return Router(
        [
            *page_routes(),
            Route("/execute", execute, methods=["POST"]),
            Route("/v2/execute", execute, methods=["POST"]),
            Route("/execute/{job_id}", Attach(gateway), methods=["GET"]),
            Route("/cancel", Cancel(gateway), methods=["POST"]),
            Route("/v1/models", models, methods=["GET"]),
            Route("/v1/models/{model:path}", models, methods=["GET"]),
            Route("/v1/completions", Completions(gateway, parse_completion), methods=["POST"]),
            Route("/v1/chat/completions", Completions(gateway, parse_chat), methods=["POST"]),
            Route("/openapi.json", OpenApi(), methods=["GET"]),
            Route("/shutdown", Shutdown(gateway), methods=["POST"]),
            Route("/metrics", MetricsPage(gateway.metrics), methods=["GET"]),
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
