"""The frames of HTTP/2 (RFC 9113) by hand, as far as a client of one gRPC service needs them.

A client library costs as much processor time an event as the service does, on the cores that it measures.
"""

from __future__ import annotations

from collections.abc import Iterator

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
ACK = END_STREAM = 1
END_HEADERS = 4
# The largest windows there are: what is read is never held up.
_LARGEST_WINDOW = 2**31 - 1
_FIRST_WINDOW = 65535
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def opening() -> bytes:
    """What a client sends first."""
    settings = b"\x00\x04" + _LARGEST_WINDOW.to_bytes(4, "big")
    window = (_LARGEST_WINDOW - _FIRST_WINDOW).to_bytes(4, "big")
    return PREFACE + frame(SETTINGS, settings) + frame(WINDOW_UPDATE, window)


def call_headers(target: str, method: str) -> bytes:
    """The header block of a call of `/package.Service/Method`."""
    headers = (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", method),
        (":authority", target),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    )
    return b"".join(_literal(name, value) for name, value in headers)


def call(headers: bytes, message: bytes, stream: int) -> bytes:
    """A whole call with one message."""
    data = b"\0" + len(message).to_bytes(4, "big") + message
    return frame(HEADERS, headers, END_HEADERS, stream) + frame(DATA, data, END_STREAM, stream)


def frames(buffer: bytearray) -> Iterator[tuple[int, int, int, bytes]]:
    """Takes whole frames from the front of `buffer`: kind, flags, stream, payload of each."""
    begin = 0
    while len(buffer) - begin >= 9:
        end = begin + 9 + int.from_bytes(buffer[begin : begin + 3], "big")
        if len(buffer) < end:
            break
        stream = int.from_bytes(buffer[begin + 5 : begin + 9], "big")
        yield buffer[begin + 3], buffer[begin + 4], stream, bytes(buffer[begin + 9 : end])
        begin = end
    del buffer[:begin]


def answer_to(kind: int, flags: int, payload: bytes) -> bytes:
    """What a frame about the connection itself asks for; empty for most."""
    if kind not in (SETTINGS, PING) or flags & ACK:
        return b""
    return frame(kind, payload if kind == PING else b"", ACK)


def _literal(name: str, value: str) -> bytes:
    """A header as HPACK (RFC 7541) takes it without a table; both parts are shorter than 127 bytes."""
    return b"\0" + bytes((len(name),)) + name.encode() + bytes((len(value),)) + value.encode()
