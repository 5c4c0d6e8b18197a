"""The guard at the gRPC port: a layer that decides on every call before its message is read.

It stands inside the boundary, which turns its refusals into statuses.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING, Any

import grpc

from tokenwire.errors import TokenwireError
from tokenwire.observe.logging import bind_context
from tokenwire.security.admission import Admission, set_current_admission
from tokenwire.security.guard import VOUCHED_KEY, Credentials, Guard, certificate_identity
from tokenwire.security.policy import Rule, method_rule

if TYPE_CHECKING:
    from tokenwire.rpc.boundary import Handler, RpcHandler


class GuardLayer:
    """Refuses or admits each call.

    Args:
        guard: who decides.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    def wrap(self, handler: RpcHandler, details: grpc.HandlerCallDetails) -> RpcHandler:
        rule = method_rule(details.method)
        metadata = details.invocation_metadata
        authorization, api_keys = _values(metadata, "authorization"), _values(metadata, "x-api-key")
        sent = Credentials(authorization, api_keys)
        needs_certificate = self._guard.needs_certificate(sent)
        if not needs_certificate:
            # All is known without the connection, so that a refusal costs no message.
            try:
                self._guard.check_limits(rule, self._guard.authorize(rule, sent))
            except TokenwireError as error:
                return _refusing(error)

        def admit(context: Any) -> Admission:
            identity = None
            if needs_certificate:
                vouched = (self._guard.vouched(value) for value in _values(metadata, VOUCHED_KEY))
                identity = next(vouched, None) or peer_identity(context.auth_context())
            credentials = Credentials(authorization, api_keys, identity)
            admission = self._guard.admit(rule, self._guard.authorize(rule, credentials))
            if not self._guard.is_open and (rule is None or not rule.public):
                bind_context(principal=admission.principal.name)
            set_current_admission(admission)
            return admission

        return _admitting(handler, rule, admit)


class _AdmittedStream:
    """A handler's messages, whose end ends the admission. Reading them costs nothing more."""

    def __init__(self, messages: Any, admission: Admission) -> None:
        self._messages = messages
        self._admission = admission

    def __aiter__(self) -> AsyncIterator[Any]:
        messages: AsyncIterator[Any] = self._messages.__aiter__()
        return messages

    async def aclose(self) -> None:
        try:
            await self._messages.aclose()
        finally:
            self._admission.close()


def _refusing(error: TokenwireError) -> RpcHandler:
    """A handler that raises the error. As one for streams it is called before any message is read."""

    def refuse(requests: Any, context: Any) -> AsyncIterator[Any]:
        raise error

    return grpc.stream_stream_rpc_method_handler(refuse)


def _admitting(handler: RpcHandler, rule: Rule | None, admit: Callable[[Any], Admission]) -> RpcHandler:
    deserialize, serialize = handler.request_deserializer, handler.response_serializer
    if handler.unary_unary is not None:
        return grpc.unary_unary_rpc_method_handler(_unary(handler.unary_unary, admit), deserialize, serialize)
    if handler.unary_stream is not None:
        return grpc.unary_stream_rpc_method_handler(_streaming(handler.unary_stream, admit), deserialize, serialize)
    if handler.stream_stream is not None:
        return grpc.stream_stream_rpc_method_handler(_streaming(handler.stream_stream, admit), deserialize, serialize)
    raise NotImplementedError("no service here takes a stream and answers once")


def _unary(handler: Handler, admit: Callable[[Any], Admission]) -> Handler:
    async def call(request: Any, context: Any) -> Any:
        with admit(context):
            return await handler(request, context)

    return call


def _streaming(handler: Handler, admit: Callable[[Any], Admission]) -> Handler:
    def call(request: Any, context: Any) -> _AdmittedStream:
        admission = admit(context)
        if hasattr(request, "__aiter__"):
            request = _while_valid(request, admission)
        return _AdmittedStream(handler(request, context), admission)

    return call


async def _while_valid(requests: AsyncIterator[Any], admission: Admission) -> AsyncIterator[Any]:
    async for request in requests:
        admission.require_valid()
        yield request


def peer_identity(auth_context: dict[str, Iterable[bytes]]) -> str | None:
    """The identity of the client certificate that the handshake verified; None without one."""

    def names(key: str) -> list[str]:
        return [value.decode("utf-8", "replace") for value in auth_context.get(key, ())]

    return certificate_identity(names("peer_uri"), names("peer_dns"), names("x509_common_name"))


def _values(metadata: Any, key: str) -> list[str]:
    return [value if isinstance(value, str) else "" for name, value in metadata or () if name == key]
