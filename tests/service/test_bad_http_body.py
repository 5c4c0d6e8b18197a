"""Every case of a bad body that applies (docs/bad-input.md: H6 to H13, H15, and text), each with its exact outcome.

Beside each runs a stream that must not notice.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from service.helpers_bad_http import BODY, beside_a_stream, post, reason


@pytest.fixture
async def gateway(worker: Any, start_gateway: Any) -> AsyncIterator[Any]:
    async with beside_a_stream(worker, start_gateway) as gateway:
        yield gateway


NOT_JSON = {
    "H6 empty": b"",
    "H6 words": b"prompt=x",
    "H6 byte order mark": b"\xef\xbb\xbf" + BODY,
    "H6 trailing text": BODY + b"x",
    "H6 two objects": BODY + BODY,
    "H6 trailing comma": b'{"job_id":"j",}',
    "H6 single quotes": b"{'job_id':'j'}",
    "H6 comment": b'{"job_id":"j"/**/}',
    "H6 control character": b'{"job_id":"\n"}',
    "H6 UTF-16": BODY.decode().encode("utf-16-le"),
    "H7 NaN": b'{"job_id":"j","prompt":"x","temperature":NaN}',
    "H7 Infinity": b'{"job_id":"j","prompt":"x","temperature":-Infinity}',
    "H7 1e999": b'{"job_id":"j","prompt":"x","temperature":1e999}',
    "H8 duplicate key": b'{"job_id":"j","prompt":"x","prompt":"y"}',
    "H8 deep duplicate key": b'{"job_id":"j","prompt":"x","logit_bias":{"1":1,"1":2}}',
    "H9 5,000 digits": b'{"job_id":"j","prompt":"x","seed":' + b"9" * 5000 + b"}",
    "H9 5,000 decimals": b'{"job_id":"j","prompt":"x","temperature":0.' + b"1" * 5000 + b"}",
    "H10 depth 100,000": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "H10 open depth 100,000": b"[" * 100_000,
    "H10 depth 65": b'{"a":' + b"[" * 64 + b"]" * 64 + b"}",
    "H11 array": b"[]",
    "H11 string": b'"x"',
    "H11 null": b"null",
    "H11 number": b"1",
    "H10 many values": b'{"a":[' + b",".join([b'""'] * 210_000) + b"," + b",".join([b"[]"] * 65) + b"]}",
}


@pytest.mark.parametrize("path", ["/execute", "/v1/chat/completions"])
@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON.keys())
async def test_what_is_not_strict_json_is_refused(gateway: Any, path: str, body: bytes) -> None:
    response = await post(gateway, body, path)
    assert response.status_code == 400
    error = response.json()["error"]
    if path == "/execute":
        assert reason(response) == "INVALID_JSON"
    else:
        assert (error["code"], error["type"]) == ("invalid_json", "invalid_request_error")


async def test_depth_is_measured_outside_strings(gateway: Any) -> None:
    """H10. Brackets in a text are text, also behind escaped quotes and backslashes."""
    prompt = '[{"\\' * 5000
    assert (await post(gateway, json.dumps({"job_id": "j", "prompt": prompt, "max_tokens": 1}))).status_code == 400
    prompt = '[{"\\' * 500
    assert (await post(gateway, json.dumps({"job_id": "j", "prompt": prompt, "max_tokens": 1}))).status_code == 200


WRONG_TYPES = [
    ("max_tokens", True),
    ("max_tokens", "1"),
    ("max_tokens", 1.0),
    ("seed", "1"),
    ("top_k", 1.5),
    ("temperature", "1"),
    ("temperature", False),
    ("temperature", [1]),
    ("stop", 1),
    ("stop", [1]),
    ("stop", {"a": "b"}),
    ("logit_bias", [1]),
    ("prompt", 1),
    ("prompt", ["x"]),
    ("job_id", 1),
    ("prompt_tokens", [True]),
    ("prompt_tokens", "1"),
    ("messages", {"role": "user"}),
    ("detach", 1),
    ("response_format", "json"),
]


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES, ids=[f"{name}-{value}" for name, value in WRONG_TYPES])
async def test_types_are_not_converted(gateway: Any, name: str, value: Any) -> None:
    """H12."""
    response = await post(gateway, json.dumps({"job_id": "j", "prompt": "x", name: value}))
    assert response.status_code == 400
    fields = {field["field"]: field["reason"] for field in response.json()["error"]["details"]["fields"]}
    assert fields[name] == "TYPE"


@pytest.mark.parametrize(
    "media",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "application/jsonx"],
)
async def test_only_json_is_read(gateway: Any, media: str) -> None:
    """H13. These are what a page elsewhere can send without asking first."""
    response = await post(gateway, BODY, **{"content-type": media})
    assert (response.status_code, response.json()["error"]["code"]) == (415, "UNSUPPORTED_MEDIA_TYPE")


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate", "zstd", "identity, gzip"])
async def test_compressed_bodies_are_refused(gateway: Any, coding: str) -> None:
    """H15."""
    assert (await post(gateway, b"\x1f\x8b", **{"content-encoding": coding})).status_code == 415


SURROGATES = {
    "alone": '"\\ud800"',
    "low first": '"\\udc00\\ud800"',
    "upper case": '"\\uD83D"',
    "before text": '"\\ud83dx"',
    "two high": '"\\ud83d\\ud83d"',
}


@pytest.mark.parametrize("text", SURROGATES.values(), ids=SURROGATES.keys())
@pytest.mark.parametrize("field", ["prompt", "job_id", "unknown"])
async def test_half_a_surrogate_pair(gateway: Any, text: str, field: str) -> None:
    """U1."""
    given = {"job_id": '"j"', "prompt": '"x"', field: text}
    response = await post(gateway, "{" + ",".join(f'"{name}":{value}' for name, value in given.items()) + "}")
    assert (response.status_code, reason(response)) == (400, "INVALID_UNICODE")


@pytest.mark.parametrize(
    "data", [b"\xc0\xaf", b"\xed\xa0\x80", b"\xf0\x9f\x98", b"\xff", b"\xf4\x90\x80\x80"], ids=lambda data: data.hex()
)
async def test_bytes_that_are_not_utf8(gateway: Any, data: bytes) -> None:
    """U3."""
    response = await post(gateway, b'{"job_id":"j","prompt":"' + data + b'"}')
    assert (response.status_code, reason(response)) == (400, "INVALID_UNICODE")


async def test_a_whole_surrogate_pair_and_a_nul_are_text(gateway: Any, worker: Any) -> None:
    """U2, U9."""
    for text, chars in (("\\ud83d\\ude00", "\U0001f600"), ("a\\u0000b", "a\0b"), ("e\\u0301", "e\u0301")):
        response = await post(gateway, f'{{"job_id":"j","prompt":"{text}"}}')
        assert response.status_code == 200
        assert worker.fake.jobs[-1].spec["prompt_ids"] == [ord(char) % 1000 for char in chars]


@pytest.mark.parametrize("job_id", ["\u0430bc", "a\u202eb", "a b", "a/b", "..\\x", "a\n", "\uff41", "", "a" * 129])
async def test_ids_are_ascii(gateway: Any, job_id: str) -> None:
    """U10, R34."""
    response = await post(gateway, json.dumps({"job_id": job_id, "prompt": "x"}))
    assert (response.status_code, reason(response)) == (400, "PATTERN")
    assert (await post(gateway, json.dumps({"job_id": job_id}), "/cancel")).status_code == 400


@pytest.mark.parametrize(
    "char", ["a", "\u0301", "\u05d0", "\ufeff", "\u2028", "\U0001f600"], ids=lambda char: f"{ord(char):x}"
)
async def test_a_megabyte_of_one_character_is_refused_quickly(gateway: Any, char: str) -> None:
    """U8, R18. Refused by its length before anything looks at it."""
    body = json.dumps({"job_id": "j", "prompt": char * (900_000 // len(char.encode()))}, ensure_ascii=False)
    began = asyncio.get_running_loop().time()
    response = await post(gateway, body)
    assert (response.status_code, reason(response)) == (400, "PROMPT_TOO_LARGE")
    assert asyncio.get_running_loop().time() - began < 2


async def test_no_error_repeats_what_was_sent(gateway: Any) -> None:
    """W-22."""
    for body in (
        {"job_id": "secret words", "prompt": "secret words", "stop": ["secret words" * 20]},
        {"job_id": "j", "prompt": {"secret words": 1}},
        {"job_id": "j", "prompt": "x", "logit_bias": {"secret words": 1}},
    ):
        response = await post(gateway, json.dumps(body))
        assert response.status_code == 400
        assert "secret" not in response.text
    assert "secret" not in (await gateway.http.get("/secret-path")).text
