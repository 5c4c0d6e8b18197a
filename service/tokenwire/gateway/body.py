"""Request bodies: read under a cap, parsed strictly.

Python's own reader takes NaN, duplicate keys and 5,000-digit numbers, and a lone surrogate only fails much later; a
client that sends these made a mistake, and hears of it here.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from tokenwire.errors import FieldViolation, TokenwireError
from tokenwire.gateway.asgi import Receive, Scope, header, headers
from tokenwire.gateway.errors import HttpError

MAX_DEPTH = 64
MAX_VALUES = 200_000
MAX_NUMBER_CHARS = 64

# Strings are matched whole, also unterminated ones, so that the time stays linear.
_STRUCTURE = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89abAB-F]|[\ud800-\udfff]", re.IGNORECASE)
_JSON_TYPE = re.compile(r"application/json\s*(;\s*charset=\"?utf-8\"?\s*)?", re.IGNORECASE)


async def read_json_object(scope: Scope, receive: Receive, max_bytes: int) -> dict[str, Any]:
    """The body of a request, which must be a JSON object.

    Raises:
        HttpError: not JSON by its header, compressed, or longer than `max_bytes`.
        TokenwireError: INVALID_REQUEST naming what is wrong with the JSON.
        ClientGoneError: the client left before it was complete.
    """
    if not _JSON_TYPE.fullmatch(header(scope, b"content-type").strip()):
        raise HttpError("UNSUPPORTED_MEDIA_TYPE")
    if header(scope, b"content-encoding").strip().lower() not in ("", "identity"):
        raise HttpError("UNSUPPORTED_MEDIA_TYPE")
    return parse_json_object(await read_body(scope, receive, max_bytes))


async def read_body(scope: Scope, receive: Receive, max_bytes: int) -> bytes:
    """The body, refused before it is read where its length is declared."""
    declared = headers(scope, b"content-length")
    if declared and (not declared[0].isdigit() or int(declared[0]) > max_bytes):
        raise too_large(max_bytes)
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        part = message.get("body", b"")
        if len(body) + len(part) > max_bytes:
            raise too_large(max_bytes)
        body += part
        if not message.get("more_body", False):
            return bytes(body)


class ClientGoneError(Exception):
    """The client closed the connection: there is nobody to answer."""


def too_large(max_bytes: int) -> HttpError:
    # What was not read stays in the connection, which is of no more use.
    return HttpError("BODY_TOO_LARGE", f"the request body has more than {max_bytes} bytes", {"connection": "close"})


def parse_json_object(data: bytes) -> dict[str, Any]:
    """A JSON object without duplicate keys, numbers that are not finite, half surrogates or deep nesting.

    Raises:
        TokenwireError: INVALID_REQUEST; the text itself is not repeated.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        _refuse("INVALID_UNICODE", "utf8", "the body is not UTF-8")
    _check_structure(text)
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_int=_int, parse_float=_float, parse_constant=_constant
        )
    except (ValueError, RecursionError):
        _refuse("INVALID_JSON", "json", "the body is not valid JSON")
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            _refuse("INVALID_UNICODE", "unicode", "a text holds half of a surrogate pair")
    if not isinstance(value, dict):
        _refuse("INVALID_JSON", "object", "the body must be a JSON object")
    return value


def _check_structure(text: str) -> None:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth = 0
    for count, match in enumerate(_STRUCTURE.finditer(text)):
        mark = match.group()
        depth += (mark in "[{") - (mark in "]}")
        if depth > MAX_DEPTH:
            _refuse("INVALID_JSON", f"depth({MAX_DEPTH})", f"the body nests deeper than {MAX_DEPTH} levels")
        if count > MAX_VALUES:
            _refuse("INVALID_JSON", f"max_count({MAX_VALUES})", f"the body holds more than {MAX_VALUES} values")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        _refuse("INVALID_JSON", "unique_keys", "an object names a key twice")
    return result


def _int(digits: str) -> int:
    if len(digits) > MAX_NUMBER_CHARS:
        _refuse("INVALID_JSON", f"digits({MAX_NUMBER_CHARS})", "a number has too many digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits) if len(digits) <= MAX_NUMBER_CHARS else math.inf
    if math.isinf(value):
        _refuse("INVALID_JSON", "finite", "a number is too large or has too many digits")
    return value


def _constant(name: str) -> NoReturn:
    _refuse("INVALID_JSON", "finite", "NaN and Infinity are not JSON")


def _refuse(reason: str, constraint: str, message: str) -> NoReturn:
    violation = FieldViolation("", reason, constraint, message)
    raise TokenwireError("INVALID_REQUEST", message, fields=[violation]) from None
