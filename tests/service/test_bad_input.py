"""The catalogue of bad requests (docs/bad-input.md), each with its exact outcome, beside a stream that must not notice.

Cases of credentials are in test_security.py, of text in test_bad_text.py, of response formats over the real library in
test_structured_output.py.
"""

from __future__ import annotations

import asyncio
import re
import struct
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from service.test_boundary import CANCEL, EXECUTE, error_info, failure_of, raw, violations
from tokenwire.bounds import RULES
from tokenwire.engine.fake import FakeEngineError, varint
from tokenwire.v1 import inference_pb2 as pb

Status = grpc.StatusCode
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "bad-input.md"
NAN, INF = float("nan"), float("inf")
PRIVATE = "correct horse"


def fields(**given: Any) -> bytes:
    """An otherwise good request."""
    if not {"prompt", "prompt_tokens", "chat"} & given.keys():
        given["prompt"] = PRIVATE
    return pb.ExecuteRequest(**{"job_id": "bad", **given}).SerializeToString()


def chat(*turns: tuple[str, str]) -> pb.Chat:
    return pb.Chat(messages=[pb.ChatMessage(role=role, content=content) for role, content in turns])


def integer(number: int, value: int) -> bytes:
    """A field that no client library would write: any integer, negative ones as protobuf spells them."""
    return varint(number << 3) + varint(value & (2**64 - 1))


def bias(token: int, value: float) -> bytes:
    entry = integer(1, token) + varint(2 << 3 | 5) + struct.pack("<f", value)
    return varint(15 << 3 | 2) + varint(len(entry)) + entry


@dataclass(frozen=True)
class Case:
    """A message and what must come of it: a status, and the refused fields, or an error code, or no refusal at all."""

    id: str
    data: bytes
    status: Status = Status.INVALID_ARGUMENT
    refused: tuple[tuple[str, str], ...] = ()
    code: str = "INVALID_REQUEST"
    facts: dict[str, str] = field(default_factory=dict)


def refused(id_: str, data: bytes, *found: tuple[str, str], **facts: str) -> Case:
    return Case(id_, data, refused=found, facts=facts)


ALL_MISSING = (("job_id", "PATTERN"), *((name, "ONE_OF") for name in ("prompt", "prompt_tokens", "chat")))
MALFORMED = ("", "MALFORMED_PROTO")

CASES = [
    refused("R1", b"\xff\xff\xff\xff", MALFORMED),
    refused("R2", b"\x0a\x02\xff\xfe", MALFORMED),
    refused("R2-overlong-U3", b"\x12\x02\xc0\x80", MALFORMED),
    refused("R2-truncated-U3", b"\x12\x02\xe2\x82", MALFORMED),
    refused("R2-surrogate-U1", b"\x12\x03\xed\xa0\x80", MALFORMED),
    refused("R3", b"\x2b" * 102 + b"\x2c" * 102, MALFORMED),
    refused("R4", b"", *ALL_MISSING),
    refused("R5", integer(999, 1) + b"\xfa\x3f\x03abc", *ALL_MISSING),
    refused("R16-neither", fields(prompt="")[: len(b"\x0a\x03bad")], *ALL_MISSING[1:]),
    refused("R17", fields(prompt=""), ("prompt", "PROMPT_EMPTY")),
    refused("R17-no-messages", fields(chat=pb.Chat()), ("chat.messages", "PROMPT_EMPTY")),
    refused("R17-no-tokens-after-template", fields(chat=chat(("user", ""))), ("chat.messages", "PROMPT_EMPTY")),
    refused("R17-no-ids", fields(prompt_tokens=pb.TokenIds()), ("prompt_tokens", "PROMPT_EMPTY")),
    refused("R18", fields(prompt=PRIVATE * 4000), ("prompt", "PROMPT_TOO_LARGE")),
    refused("R18-chat", fields(chat=chat(("user", PRIVATE * 4000))), ("chat.messages", "PROMPT_TOO_LARGE")),
    Case(
        "R19",
        fields(prompt="x" * 4096),
        Status.OUT_OF_RANGE,
        (),
        "CONTEXT_LENGTH_EXCEEDED",
        {"limit": "4096", "actual": "4097"},
    ),
    Case(
        "R19-with-answer",
        fields(prompt="x" * 4000, max_tokens=97),
        Status.OUT_OF_RANGE,
        (),
        "CONTEXT_LENGTH_EXCEEDED",
        {"limit": "4096", "actual": "4097"},
    ),
    *(refused(f"R20{value}", fields() + integer(5, value), ("max_tokens", "RANGE")) for value in (0, -1, 2**31, 2049)),
    *(refused(f"R22:{value}", fields(temperature=value), ("temperature", "FINITE")) for value in (NAN, INF, -INF)),
    *(refused(f"R22:{value}", fields(temperature=value), ("temperature", "RANGE")) for value in (-1, 1e30, 2.01)),
    *(refused(f"R23:{value}", fields(top_p=value), ("top_p", "RANGE")) for value in (0, 1.0001, -0.0)),
    refused("R23:nan", fields(top_p=NAN), ("top_p", "FINITE")),
    *(refused(f"R24:{value}", fields() + integer(8, value), ("top_k", "RANGE")) for value in (-5, 1001)),
    refused("R26", fields(logprobs=10**6), ("logprobs", "RANGE")),
    refused("R27-vocabulary", fields(logit_bias={1000: 1.0, 5: 1.0}), ("logit_bias[1000]", "VOCABULARY")),
    refused("R27-nan", fields(logit_bias={4: NAN, 5: 101.0}), ("logit_bias[4]", "FINITE"), ("logit_bias[5]", "RANGE")),
    refused("R27-last-of-duplicates-counts", fields() + bias(5, 1.0) + bias(5, NAN), ("logit_bias[5]", "FINITE")),
    refused("R27-count", fields(logit_bias=dict.fromkeys(range(301), 0.0)), ("logit_bias", "MAX_COUNT")),
    refused("R28-count", fields(stop=["x"] * 500_000), ("stop", "MAX_COUNT")),
    refused("R28-empty", fields(stop=["", "x"]), ("stop[0]", "NON_EMPTY")),
    refused("R28-long", fields(stop=[PRIVATE * 80_000]), ("stop[0]", "LENGTH")),
    refused(
        "R31-unset",
        fields(response_format=pb.ResponseFormat()),
        ("response_format", "ONE_OF"),
        ("response_format", "UNSUPPORTED"),
    ),
    refused(
        "R32-roles",
        fields(chat=chat(("root", "x"), ("user", "x"), ("tool", PRIVATE))),
        ("chat.messages[0].role", "ONE_OF"),
        ("chat.messages[2].role", "ONE_OF"),
    ),
    refused("R32-count", fields(chat=chat(*[("user", "x")] * 10_000)), ("chat.messages", "MAX_COUNT")),
    *(
        refused(f"R36-id-{n}", fields(job_id=bad), ("job_id", "PATTERN"))
        for n, bad in enumerate(["../x", "a\0b", "x" * 129, "‮x"])
    ),
    refused("U10", fields(job_id="jоb"), ("job_id", "PATTERN")),  # a Cyrillic o
]


@pytest.fixture
async def canary(worker: Any) -> AsyncIterator[Callable[[], Any]]:
    """A stream that runs all the while. Call it to see that it goes on, one token at a time."""
    worker.fake.tokens = ["x"] * 100
    call = worker.stub.Execute(pb.ExecuteRequest(job_id="canary", prompt="x"))
    assert (await call.read()).HasField("started")
    index = 0

    async def sings() -> None:
        nonlocal index
        worker.fake.jobs[0].step()
        event = await asyncio.wait_for(call.read(), 20)
        assert (event.token.i, list(event.token.ids)) == (index, [index])
        index += 1

    yield sings
    await sings()
    call.cancel()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
async def test_a_bad_request_gets_its_exact_answer(worker: Any, canary: Any, case: Case) -> None:
    began = time.monotonic()
    call = raw(worker, case.data)
    error = await failure_of(call)
    assert time.monotonic() - began < 5
    assert error.code() is case.status
    assert tuple((each.field, each.reason) for each in violations(error)) == case.refused
    info = error_info(error)
    assert info.reason == case.code
    assert case.facts.items() <= dict(info.metadata).items()
    assert PRIVATE not in repr(error)
    assert not re.search(r"/|Traceback|0x[0-9a-f]{6}", error.details() or "")
    assert len(worker.fake.jobs) == 1, "it reached the engine"
    await canary()


async def test_r39_twenty_wrong_fields_get_sixteen_violations_in_one_answer(worker: Any, canary: Any) -> None:
    numbers = [rule.field for rule in RULES if rule.field != "seed"]
    wrong: dict[str, Any] = dict.fromkeys(numbers, 2**31 - 1)
    wrong |= {"stop": ["", "", "", ""], "logit_bias": {1000: NAN, 1001: NAN}, "cache_salt": "", "job_id": "!"}
    wrong |= {"chat": chat(("root", "x"), ("root", "x")), "prompt": None}
    error = await failure_of(raw(worker, fields(**wrong)))
    listed = violations(error)
    assert len(listed) == 16
    assert {each.field for each in listed} > {"job_id", "chat.messages[0].role", "chat.messages[1].role", *numbers}
    assert dict(error_info(error).metadata)["truncated"] == "true"
    assert int(dict(error_info(error).metadata)["violations"]) >= 20
    assert len(dict(error.trailing_metadata())["grpc-status-details-bin"]) <= 4096
    await canary()


async def test_r6_r7_r12_what_is_too_large_is_refused_by_the_transport(worker: Any, canary: Any) -> None:
    execute = worker.channel.unary_stream(EXECUTE, None, None)
    oversized = execute(b"\x12" + b"x" * (4 * 2**20), timeout=20)
    bomb = execute(bytes(64 * 2**20), timeout=20, compression=grpc.Compression.Gzip)
    metadata = execute(fields(), timeout=20, metadata=(("x-large", "x" * 20_480),))
    for call in (oversized, bomb, metadata):
        assert (await failure_of(call)).code() is Status.RESOURCE_EXHAUSTED
    assert len(worker.fake.jobs) == 1
    await canary()


@pytest.mark.parametrize("method", ["/tokenwire.v1.Inference/Nothing", "/no.Service/Execute", "/", "/../Execute"])
async def test_r9_an_unknown_method_is_unimplemented(worker: Any, canary: Any, method: str) -> None:
    assert (await failure_of(raw(worker, b"", method))).code() is Status.UNIMPLEMENTED
    await canary()


async def test_r10_a_call_without_a_message_holds_nothing(worker: Any, canary: Any) -> None:
    async def nothing() -> AsyncIterator[bytes]:
        return
        yield b""

    call = worker.channel.stream_unary(CANCEL, None, None)(nothing(), timeout=0.5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is Status.DEADLINE_EXCEEDED
    execute = worker.channel.stream_stream(EXECUTE, None, None)(nothing(), timeout=0.5)
    with pytest.raises(grpc.aio.AioRpcError):
        await execute.read()
    assert len(worker.fake.jobs) == 1
    await canary()


async def test_r11_a_second_message_changes_nothing(worker: Any, canary: Any) -> None:
    async def two() -> AsyncIterator[bytes]:
        for _ in range(2):
            yield pb.CancelRequest(job_id="nobody").SerializeToString()

    answer = await worker.channel.stream_unary(CANCEL, None, None)(two(), timeout=20)
    assert pb.CancelResponse.FromString(answer).outcome == pb.CancelResponse.OUTCOME_NOT_FOUND
    await canary()


async def accepted(worker: Any, data: bytes) -> dict[str, Any]:
    """What the engine is given for a message that must be accepted."""
    call = raw(worker, data)
    event = pb.ExecuteEvent.FromString(await asyncio.wait_for(call.read(), 20))
    assert event.HasField("started")
    spec: dict[str, Any] = worker.fake.jobs[-1].spec
    assert event.started.seed == spec["seed"]
    call.cancel()
    return spec


async def test_r16_of_two_inputs_on_the_wire_the_last_counts(worker: Any, canary: Any) -> None:
    """The message's `oneof` makes two inputs impossible in it; protobuf drops all but the last that were written."""
    both = fields(prompt="ab") + pb.ExecuteRequest(prompt_tokens=pb.TokenIds(ids=[7])).SerializeToString()
    assert (await accepted(worker, both))["prompt_ids"] == [7]
    await canary()


async def test_r30_every_seed_is_accepted(worker: Any, canary: Any) -> None:
    for seed in (0, 2**63, 2**64 - 1):
        assert (await accepted(worker, fields(job_id=f"seed-{seed}", seed=seed)))["seed"] == seed
    await canary()


async def test_u2_nul_in_a_prompt_is_text(worker: Any, canary: Any) -> None:
    assert (await accepted(worker, fields(prompt="a\0b")))["prompt_ids"] == [97, 0, 98]
    await canary()


async def test_r25_r29_r33_r37_fields_that_the_message_lacks_are_ignored(worker: Any, canary: Any) -> None:
    """As protobuf has it: `n`, stop ids, image parts and a model's name are unknown fields here, and change nothing."""
    spec = await accepted(worker, fields(prompt="ab") + integer(990, 10**9) + b"\xf2\x3d\x05model")
    assert spec["prompt_ids"] == [97, 98]
    await canary()


async def test_r21_what_can_never_fit_is_told_not_to_come_back(worker: Any, canary: Any) -> None:
    worker.fake.submit_error = FakeEngineError("KV_CAPACITY", "needs 5000 tokens, the KV pool holds 4096")
    error = await failure_of(raw(worker, fields()))
    assert (error.code(), error_info(error).reason) == (Status.RESOURCE_EXHAUSTED, "KV_CAPACITY")
    assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "-1"
    await canary()


async def test_r36_a_live_id_is_taken_and_a_finished_one_is_free(worker: Any, canary: Any) -> None:
    error = await failure_of(raw(worker, fields(job_id="canary")))
    assert (error.code(), error_info(error).reason) == (Status.ALREADY_EXISTS, "ALREADY_EXISTS")
    worker.fake.eager = True
    for _ in range(2):
        call = raw(worker, fields(job_id="again"))
        events = [pb.ExecuteEvent.FromString(data) async for data in call]
        assert (await call.code(), events[-1].WhichOneof("event")) == (Status.OK, "end")
    worker.fake.eager = False
    await canary()


async def test_r38_a_worker_that_loads_says_when_to_come_back(start_worker: Any) -> None:
    loading = await start_worker(ready=False)
    error = await failure_of(raw(loading, b"" + fields()))
    assert (error.code(), error_info(error).reason) == (Status.UNAVAILABLE, "UNAVAILABLE")
    assert dict(error_info(error).metadata)["phase"] == "loading"
    assert int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) > 0


def documented() -> dict[str, str]:
    """The rows of the catalogue in the documentation, by id."""
    rows = re.findall(r"^\| ([RUH]\d+) \| (.*) \|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == len(dict(rows)), "an id has two rows"
    return dict(rows)


def test_the_documentation_has_a_row_for_every_case() -> None:
    rows = documented()
    assert {f"R{n}" for n in range(1, 41)} | {f"U{n}" for n in range(1, 11)} <= rows.keys()


def test_what_is_documented_as_tested_has_a_test_that_names_it() -> None:
    tests = Path(__file__).resolve().parents[1]
    for name, row in documented().items():
        *_, place = row.split(" | ")
        if place.startswith("left out"):
            assert len(place) > 20, f"{name} says nothing of why"
            continue
        for path in re.findall(r"`([\w/]+\.(?:py|cpp))`", place):
            source = (tests / path).read_text(encoding="utf-8")
            assert re.search(rf"\b{name}\b|_{name.lower()}_|[\"-]{name}\b", source), f"{path} does not name {name}"
        assert "`" in place, f"{name} has no test"
