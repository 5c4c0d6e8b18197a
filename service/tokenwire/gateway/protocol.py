"""uvicorn's HTTP/1.1 protocol with the bounds that it lacks: size and number of header fields, time for head and body,
pipelined requests, readers that stall, and framing that two readers could understand differently."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from tokenwire.gateway.errors import HTTP_ERRORS, HttpError
from tokenwire.gateway.protection import CERTIFICATE, identity_of
from tokenwire.http_config import HttpSettings
from tokenwire.observe.logging import get_logger

MAX_PIPELINED = 8
LINGER_SECONDS = 1.0

_METHOD = re.compile(rb"[A-Za-z-]{1,32} ")

# What HTTP adds to a header field: colon, space and line end.
_FIELD_OVERHEAD = 4


def protocol_class(settings: HttpSettings) -> type[HttpToolsProtocol]:
    """The protocol with the bounds of `settings`, as uvicorn wants it: a class."""

    class Protocol(BoundedProtocol):
        bounds = settings

    return Protocol


class BoundedProtocol(HttpToolsProtocol):
    bounds: HttpSettings

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._unparsed_bytes = 0
        self._reading_head = True
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        tls = transport.get_extra_info("ssl_object")
        certificate = tls.getpeercert() if tls is not None else None
        if certificate:
            self.app_state = {**self.app_state, CERTIFICATE: identity_of(certificate)}
        if len(self.connections) > self.bounds.http_max_connections:
            self._refused = True
            transport.abort()
            return
        self._set_deadline(self.bounds.http_header_timeout_ms)

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_deadline()
        self._clear_stalled()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._unset_keepalive_if_required()
        if self._deadline is None and self._is_idle():
            self._set_deadline(self.bounds.http_header_timeout_ms)
        if self._reading_head:
            # A head without an end would grow in the parser, unseen by on_header.
            self._unparsed_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse(HttpError("MALFORMED_HTTP", "this server speaks HTTP/1.1 only"))
        except httptools.HttpParserInvalidMethodError:
            is_method = _METHOD.match(data) is not None
            self._refuse(HttpError("METHOD_NOT_ALLOWED" if is_method else "MALFORMED_HTTP"))
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            self._refuse(cause if isinstance(cause, HttpError) else HttpError("MALFORMED_HTTP"))
        except httptools.HttpParserError:
            self._refuse(HttpError("MALFORMED_HTTP"))
        else:
            if self._reading_head and self._unparsed_bytes > self.bounds.http_max_header_bytes:
                self._refuse(HttpError("HEADERS_TOO_LARGE"))

    # Parser callbacks

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._reading_head = True
        self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count_head(len(name) + len(value) + _FIELD_OVERHEAD)
        if len(self.headers) > self.bounds.http_max_headers:
            raise HttpError("HEADERS_TOO_LARGE")

    def on_headers_complete(self) -> None:
        if self.parser.get_http_version() not in ("1.0", "1.1"):
            raise HttpError("MALFORMED_HTTP", "this server speaks HTTP/1.1 only")
        names = [name for name, _ in self.headers]
        if b"upgrade" in names or self.parser.should_upgrade():
            raise HttpError("MALFORMED_HTTP", "this server speaks HTTP/1.1 only")
        if names.count(b"content-length") > 1 or (b"content-length" in names and b"transfer-encoding" in names):
            raise HttpError("MALFORMED_HTTP", "the length of the body is ambiguous")
        if any(name == b"transfer-encoding" and value.lower() != b"chunked" for name, value in self.headers):
            raise HttpError("MALFORMED_HTTP", "a body may be chunked, and nothing else")
        if any(value[:1] in b"+-" for name, value in self.headers if name == b"content-length"):
            raise HttpError("MALFORMED_HTTP", "the length of the body is not a number")
        if not self.url.startswith(b"/") and not self.url.startswith((b"http://", b"https://")):
            raise HttpError("MALFORMED_HTTP")
        self._reading_head = False
        self._unparsed_bytes = 0
        self._set_deadline(self.bounds.http_body_timeout_ms)
        super().on_headers_complete()
        if len(self.pipeline) >= MAX_PIPELINED - 1:
            self.cycle.keep_alive = False  # the rest is not answered

    def on_message_complete(self) -> None:
        self._clear_deadline()
        super().on_message_complete()
        self._reading_head = True

    # Timers

    def pause_writing(self) -> None:
        super().pause_writing()
        self._clear_stalled()
        delay_s = self.bounds.http_stalled_reader_ms / 1000
        self._stalled = self.loop.call_later(delay_s, self._abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._clear_stalled()

    def _abort(self) -> None:
        get_logger().warning("stalled_reader_closed")
        self.transport.abort()

    def _set_deadline(self, delay_ms: int) -> None:
        self._clear_deadline()
        self._deadline = self.loop.call_later(delay_ms / 1000, self._time_out)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _clear_stalled(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _time_out(self) -> None:
        self._deadline = None
        self._refuse(HttpError("REQUEST_TIMEOUT"))

    def _is_idle(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is None or cycle.response_complete

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self.bounds.http_max_header_bytes:
            raise HttpError("HEADERS_TOO_LARGE")

    def _refuse(self, error: HttpError) -> None:
        """Answers in place of the application and closes. A request that is being answered is cut off."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._clear_deadline()
        if self._is_idle() or not self.cycle.response_started:
            self.transport.write(_whole_response(error))
        if not self._is_idle():
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.transport.can_write_eof():
            # What still comes is thrown away for a moment: closing on it would take the answer away from the client.
            self.transport.write_eof()
            self.loop.call_later(LINGER_SECONDS, self.transport.close)
        else:
            self.transport.close()


def _whole_response(error: HttpError) -> bytes:
    row = HTTP_ERRORS[error.code]
    call_id = str(uuid.uuid4())
    content = json.dumps(
        {"error": {"code": error.code, "message": error.message, "retriable": False, "correlation_id": call_id}}
    ).encode()
    head = (
        f"HTTP/1.1 {row.status} {row.code}\r\n"
        "content-type: application/json\r\n"
        f"content-length: {len(content)}\r\n"
        f"x-correlation-id: {call_id}\r\n"
        "connection: close\r\n\r\n"
    )
    return head.encode() + content
