"""What is refused of a response format before anything compiles it."""

from __future__ import annotations

import pytest

from tokenwire.bounds import MAX_GRAMMAR_DEPTH
from tokenwire.rpc.response_format import ResponseFormat, check_format

MAX_BYTES = 65536


def nested(depth: int) -> str:
    """An object in an object, `depth` of them."""
    return '{"items":' * (depth - 1) + "{}" + "}" * (depth - 1)


def refused(kind: str, text: str) -> list[tuple[str, str]]:
    return [(each.field, each.reason) for each in check_format(ResponseFormat(kind, text), MAX_BYTES)]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", "a"),
        ("regex", "a\\\\"),
        ("regex", "x" * MAX_BYTES),
        ("json_schema", "{}"),
        ("json_schema", nested(MAX_GRAMMAR_DEPTH)),
    ],
)
def test_what_can_be_compiled_passes(kind: str, text: str) -> None:
    assert refused(kind, text) == []


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("regex", "", "NON_EMPTY"),
        ("regex", "x" * (MAX_BYTES + 1), "GRAMMAR_TOO_COMPLEX"),
        ("regex", "é" * (MAX_BYTES // 2 + 1), "GRAMMAR_TOO_COMPLEX"),
        ("regex", "a\0b", "GRAMMAR_INVALID"),
        ("regex", "a\\", "GRAMMAR_INVALID"),
        ("regex", "\\\\\\", "GRAMMAR_INVALID"),
        ("json_schema", "", "NON_EMPTY"),
        ("json_schema", "{", "GRAMMAR_INVALID"),
        ("json_schema", "[]", "GRAMMAR_INVALID"),
        ("json_schema", "true", "GRAMMAR_INVALID"),
        ("json_schema", '{"maximum": ' + "9" * 5000 + "}", "GRAMMAR_INVALID"),
        ("json_schema", nested(MAX_GRAMMAR_DEPTH + 1), "GRAMMAR_TOO_COMPLEX"),
        ("json_schema", '{"a":' * 9000 + "1" + "}" * 9000, "GRAMMAR_TOO_COMPLEX"),
        ("json_schema", '{"enum":' + "[" * 30000 + "]" * 30000 + "}", "GRAMMAR_TOO_COMPLEX"),
    ],
)
def test_what_cannot_is_named(kind: str, text: str, reason: str) -> None:
    assert refused(kind, text) == [(f"response_format.{kind}", reason)]


def test_a_format_without_a_grammar_is_named() -> None:
    assert refused("", "") == [("response_format", "ONE_OF")]
