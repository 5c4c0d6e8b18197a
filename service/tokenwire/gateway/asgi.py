"""The few ASGI shapes that the gateway's parts share."""

from __future__ import annotations

import re
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_CORRELATION_ID = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
CORRELATION_HEADERS = (b"x-correlation-id", b"x-request-id")


def headers(scope: Scope, name: bytes) -> list[str]:
    """Every value of a header, in order; `name` in lower case."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def header(scope: Scope, name: bytes) -> str:
    """The header's value, several joined as HTTP allows, or an empty string."""
    return ", ".join(headers(scope, name))


def correlation_id(scope: Scope) -> str:
    """The request's, as the outermost layer fixed it: the client's if it is well-formed, else a new one."""
    known = scope.get("tokenwire.correlation_id")
    if isinstance(known, str):
        return known
    made = next(
        (value for name in CORRELATION_HEADERS for value in headers(scope, name) if _CORRELATION_ID.fullmatch(value)),
        None,
    )
    made = made or str(uuid.uuid4())
    scope["tokenwire.correlation_id"] = made
    return made


async def respond(
    send: Send,
    status: int,
    body: bytes,
    content_type: str = "application/json",
    extra: Mapping[str, str] | None = None,
) -> None:
    """Sends a whole response."""
    fields = [(b"content-type", content_type.encode()), (b"content-length", str(len(body)).encode())]
    fields += [(name.encode("latin-1"), value.encode("latin-1")) for name, value in (extra or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body})
