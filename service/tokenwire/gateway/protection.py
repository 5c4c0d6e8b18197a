"""Authentication and limits at the HTTP port, before a body is read: the same decision as at the gRPC port.

The worker decides again, with the same credential, and is the one that counts: a request is one request, whichever port
it came through.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenwire.errors import TokenwireError
from tokenwire.gateway.asgi import App, Receive, Scope, Send, headers
from tokenwire.gateway.errors import HttpError
from tokenwire.observe.logging import bind_context
from tokenwire.observe.refusals import RefusalLog
from tokenwire.security.guard import Credentials, Guard, certificate_identity
from tokenwire.security.policy import route_rule

CERTIFICATE = "tokenwire.certificate"
"""Where the protocol puts the identity of the client's certificate into the scope's state."""


class Protection:
    """Refuses who may not call, and writes it down; everything else goes on as it came."""

    def __init__(self, app: App, guard: Guard, refusals: RefusalLog) -> None:
        self._app = app
        self._guard = guard
        self._refusals = refusals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._guard.is_open:
            return await self._app(scope, receive, send)
        rule = route_rule(scope["path"])
        credentials = Credentials(
            headers(scope, b"authorization"), headers(scope, b"x-api-key"), client_certificate(scope)
        )
        try:
            if rule is None:  # whether there is such a path is told to nobody without a credential
                self._guard.authenticate(credentials)
                raise HttpError("NOT_FOUND")
            principal = self._guard.authorize(rule, credentials)
            self._guard.check_limits(rule, principal)
        except TokenwireError as error:
            host, port = scope.get("client") or ("", 0)
            self._refusals.note(error.code, method=scope["method"], peer=f"{host}:{port}")
            raise
        if not rule.public:
            bind_context(principal=principal.name)
        return await self._app(scope, receive, send)


def client_certificate(scope: Scope) -> str | None:
    """The identity of the certificate that the client showed; None without one."""
    identity = scope.get("state", {}).get(CERTIFICATE)
    return identity if isinstance(identity, str) else None


def identity_of(certificate: Mapping[str, Any]) -> str | None:
    """The identity of a verified certificate, as Python's TLS decodes it."""
    names = certificate.get("subjectAltName", ())
    common_names = (value for part in certificate.get("subject", ()) for key, value in part if key == "commonName")
    return certificate_identity(
        (value for kind, value in names if kind == "URI"),
        (value for kind, value in names if kind == "DNS"),
        common_names,
    )
