"""What every request passes before its endpoint: correlation, errors, host, origin, kind of answer."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import MutableMapping
from typing import Any

from starlette.exceptions import HTTPException

from tokenwire.errors import TokenwireError
from tokenwire.gateway import errors
from tokenwire.gateway.asgi import App, Message, Receive, Scope, Send, correlation_id, header, headers, respond
from tokenwire.gateway.body import ClientGoneError
from tokenwire.gateway.errors import HttpError
from tokenwire.http_config import HttpSettings
from tokenwire.observe.logging import bind_context, get_logger, reset_context

OPENAI_PREFIX = "/v1/"
PROBE_PREFIX = "/health"

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?", re.ASCII)
_ALLOWED_METHODS = "GET, POST"
_ALLOWED_HEADERS = "authorization, content-type, last-event-id, x-api-key, x-correlation-id, x-request-id"
_EXPOSED_HEADERS = "retry-after, x-correlation-id"

_SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
)


class Errors:
    """Outermost: names the request in log and answer, and turns every failure into its status and envelope."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call_id = correlation_id(scope)
        reset_context()
        bind_context(correlation_id=call_id)
        echoed = call_id.encode()
        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                extra = [*_SECURITY_HEADERS, (b"x-correlation-id", echoed), (b"x-request-id", echoed)]
                extra += scope.get("tokenwire.cors", ())
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        try:
            return await self._app(scope, receive, answer)
        except ClientGoneError:
            return None  # nobody is left to answer
        except (TokenwireError, HttpError) as error:
            failure: errors.Failure = error
        except HTTPException as error:
            failure = _from_starlette(error)
        except Exception:  # noqa: BLE001 - a bug of ours must not reach the client as it is
            get_logger().error("error", code="INTERNAL", exc_info=True)
            failure = TokenwireError("INTERNAL")
        if started:  # too late for a status: what was sent must not look complete
            raise RuntimeError("a request failed after its answer had begun")
        await _refuse(scope, answer, failure, call_id)
        return None


async def _refuse(scope: Scope, send: Send, failure: errors.Failure, call_id: str) -> None:
    is_openai = scope["path"].startswith(OPENAI_PREFIX)
    body = errors.openai_body(failure, call_id) if is_openai else errors.body(failure, call_id)
    await respond(send, errors.http_status(failure), body, extra=errors.headers(failure))


def _from_starlette(error: HTTPException) -> HttpError:
    if error.status_code == 405:
        return HttpError("METHOD_NOT_ALLOWED", headers=dict(error.headers or {}))
    return HttpError("NOT_FOUND")


class Hosts:
    """Refuses names that are not this server's: a page elsewhere could point its own name at this address. An address
    in place of a name cannot be pointed elsewhere, so it passes, and probes pass with any name."""

    def __init__(self, app: App, settings: HttpSettings) -> None:
        self._app = app
        self._allowed = settings.allowed_hosts | {"localhost"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not scope["path"].startswith(PROBE_PREFIX):
            sent = headers(scope, b"host")
            if len(sent) > 1 or (not sent and scope.get("http_version") == "1.1"):
                raise HttpError("MALFORMED_HTTP", "exactly one Host header is needed")
            if sent and not self._is_ours(sent[0]):
                raise HttpError("HOST_NOT_ALLOWED")
        await self._app(scope, receive, send)

    def _is_ours(self, host: str) -> bool:
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = match[1].lower().rstrip(".")
        return name in self._allowed or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


class Origins:
    """Lets pages of this server and of listed origins call, and answers their preflights; refuses pages elsewhere."""

    def __init__(self, app: App, settings: HttpSettings) -> None:
        self._app = app
        self._allowed = settings.allowed_origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origins = headers(scope, b"origin")
        if not origins:
            site, mode = header(scope, b"sec-fetch-site"), header(scope, b"sec-fetch-mode")
            if site == "cross-site" and mode != "navigate":
                raise HttpError("ORIGIN_NOT_ALLOWED")
            return await self._app(scope, receive, send)
        origin = origins[0].lower()
        listed = origin in self._allowed
        if len(origins) > 1 or not (listed or _is_same(origin, header(scope, b"host"))):
            raise HttpError("ORIGIN_NOT_ALLOWED")
        if scope["method"] == "OPTIONS" and headers(scope, b"access-control-request-method"):
            return await _answer_preflight(send, origins[0])
        if listed:  # read by the outermost layer, so that a page can read refusals too
            scope["tokenwire.cors"] = _cors(origins[0])
        return await self._app(scope, receive, send)


def _is_same(origin: str, host: str) -> bool:
    # A proxy may have ended TLS, so that only the browser knows the scheme.
    return origin.partition("://")[2] == host.lower() and origin.startswith(("http://", "https://"))


def _cors(origin: str) -> list[tuple[bytes, bytes]]:
    return [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-expose-headers", _EXPOSED_HEADERS.encode()),
        (b"vary", b"origin"),
    ]


async def _answer_preflight(send: Send, origin: str) -> None:
    fields = _cors(origin)
    fields += [
        (b"access-control-allow-methods", _ALLOWED_METHODS.encode()),
        (b"access-control-allow-headers", _ALLOWED_HEADERS.encode()),
        (b"access-control-max-age", b"600"),
        (b"content-length", b"0"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": fields})
    await send({"type": "http.response.body", "body": b""})


class Accepts:
    """406 where the client takes nothing that this path can send."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        accepted = header(scope, b"accept")
        if accepted and not any(_matches(item) for item in accepted.split(",")):
            raise HttpError("NOT_ACCEPTABLE")
        await self._app(scope, receive, send)


def _matches(item: str) -> bool:
    media, *parameters = (part.strip().lower() for part in item.split(";"))
    if any(re.fullmatch(r"q=0(\.0*)?", parameter) for parameter in parameters):
        return False
    return media in _SERVED


_SERVED = {
    "*/*",
    "application/*",
    "application/json",
    "application/openmetrics-text",
    "application/problem+json",
    "text/*",
    "text/event-stream",
    "text/html",
    "text/plain",
}


def with_app(app: App) -> App:
    """Makes Starlette's router raise for a wrong method, where it would answer in plain text."""

    async def call(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        scope["app"] = app
        await app(scope, receive, send)

    return call
