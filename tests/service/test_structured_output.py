"""Response formats over the compiled engine, a real model and the real library."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import grpc
import jsonschema
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from service.test_real_engine import (  # noqa: F401 - its fixtures
    RealWorker,
    device,
    generate,
    ids_of,
    model,
    real,
    rest,
    text_of,
)
from tokenwire.v1 import inference_pb2 as pb

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
PERSON_FORMAT = pb.ResponseFormat(json_schema=json.dumps(PERSON))
CHAT = pb.Chat(messages=[pb.ChatMessage(role="user", content="Describe a person as JSON: name, age and tags.")])
REGEX = r"(yes|no), [a-z]{2,6}(-[0-9]{3})?\."


def request_of(job_id: str, **fields: Any) -> pb.ExecuteRequest:
    fields.setdefault("chat", CHAT)
    return pb.ExecuteRequest(job_id=job_id, **{"max_tokens": 120, **fields})


async def answer(real: RealWorker, job_id: str, **fields: Any) -> list[pb.ExecuteEvent]:  # noqa: F811
    events, code = await rest(real.stub.Execute(request_of(job_id, **fields)))
    assert code is grpc.StatusCode.OK
    return events


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
async def test_every_answer_is_json_of_the_schema(real: RealWorker, temperature: float) -> None:  # noqa: F811
    answers = await asyncio.gather(
        *(
            answer(real, f"job-{seed}", response_format=PERSON_FORMAT, temperature=temperature, seed=seed)
            for seed in range(8)
        )
    )
    for events in answers:
        assert events[-1].end.stop_reason == pb.STOP_REASON_EOS
        text = text_of(events)
        value = json.loads(text)
        jsonschema.validate(value, PERSON)
        assert text == json.dumps(value, ensure_ascii=False) or "\\" in text
    if temperature:
        assert len({text_of(events) for events in answers}) > 4


async def test_every_answer_matches_the_regex(real: RealWorker) -> None:  # noqa: F811
    for seed in range(12):
        events = await answer(real, "a", response_format=pb.ResponseFormat(regex=REGEX), seed=seed, temperature=1.5)
        assert re.fullmatch(REGEX, text_of(events))
        assert events[-1].end.stop_reason == pb.STOP_REASON_EOS
        assert events[-1].end.tokens_out == len(ids_of(events))


async def test_an_answer_may_be_cut_by_count_or_by_a_stop_string(real: RealWorker) -> None:  # noqa: F811
    whole = text_of(await answer(real, "whole", response_format=PERSON_FORMAT, temperature=0))
    cut = await answer(real, "cut", response_format=PERSON_FORMAT, temperature=0, max_tokens=5)
    assert cut[-1].end.stop_reason == pb.STOP_REASON_MAX_TOKENS
    assert whole.startswith(text_of(cut))
    stopped = await answer(real, "stopped", response_format=PERSON_FORMAT, temperature=0, stop=['", "age'])
    assert stopped[-1].end.stop_reason == pb.STOP_REASON_STOP_SEQUENCE
    assert text_of(stopped) == whole[: whole.index('", "age')]


async def test_a_bound_answer_is_the_same_alone_and_in_a_crowd(real: RealWorker) -> None:  # noqa: F811
    mine = [
        {"response_format": PERSON_FORMAT, "seed": 1, "temperature": 1.0},
        {"response_format": PERSON_FORMAT, "temperature": 0, "repetition_penalty": 1.3},
        {"response_format": pb.ResponseFormat(regex=REGEX), "seed": 3, "temperature": 1.5, "top_p": 0.9},
        {"response_format": pb.ResponseFormat(json_schema='{"type": "array"}'), "seed": 4, "max_tokens": 40},
        {"seed": 5, "max_tokens": 40},
    ]
    alone = [ids_of(await answer(real, f"alone-{n}", **fields)) for n, fields in enumerate(mine)]
    together = await asyncio.gather(
        *(answer(real, f"crowd-{turn}-{n}", **fields) for turn in range(4) for n, fields in enumerate(mine))
    )
    for n, events in enumerate(together):
        assert ids_of(events) == alone[n % len(mine)]


async def test_bias_and_logprobs_work_inside_a_format(real: RealWorker, model: Any) -> None:  # noqa: F811
    (no_id,) = model.text.tokenizer.encode("no")
    events = await answer(
        real,
        "a",
        response_format=pb.ResponseFormat(regex="(yes|no)"),
        temperature=0,
        logit_bias={no_id: 100.0},
        logprobs=3,
    )
    assert text_of(events) == "no"
    entry = events[1].token.logprobs[0]
    # Log-probabilities are the model's own: what the format left out is among the alternatives.
    assert entry.id == no_id
    assert {top.t for top in entry.top} - {"yes", "no"}


def violations_of(error: grpc.aio.AioRpcError) -> list[tuple[str, str, str]]:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None
    bad_request = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad_request) for detail in status.details)
    return [(each.field, each.reason, each.description) for each in bad_request.field_violations]


@pytest.mark.parametrize(
    ("wanted", "field", "reason", "says"),
    [
        ({"regex": "(" * 60_000}, "regex", "GRAMMAR_INVALID", "unclosed group"),
        ({"regex": "x{1001,1000}"}, "regex", "GRAMMAR_INVALID", "repetition"),
        ({"regex": "x" * 65_537}, "regex", "GRAMMAR_TOO_COMPLEX", "65536 bytes"),
        ({"json_schema": '{"type": "bogus"}'}, "json_schema", "GRAMMAR_INVALID", "bogus"),
        ({"json_schema": '{"$ref": "#"}'}, "json_schema", "GRAMMAR_INVALID", "no text"),
        ({"json_schema": '{"maximum": 1e999, "type": "number"}'}, "json_schema", "GRAMMAR_INVALID", ""),
        ({"json_schema": '{"enum": ["\\ud800"]}'}, "json_schema", "GRAMMAR_INVALID", ""),
        ({"json_schema": '{"a":' * 65 + "1" + "}" * 65}, "json_schema", "GRAMMAR_TOO_COMPLEX", "64 deep"),
    ],
)
async def test_a_format_that_cannot_be_compiled_is_named_with_the_reason(  # R31
    real: RealWorker,  # noqa: F811
    wanted: dict[str, str],
    field: str,
    reason: str,
    says: str,
) -> None:
    call = real.stub.Execute(request_of("a", response_format=pb.ResponseFormat(**wanted), temperature=9))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    found = violations_of(caught.value)
    assert [each[:2] for each in found] == [("temperature", "RANGE"), (f"response_format.{field}", reason)]
    assert says in found[1][2]


async def test_a_format_too_costly_on_the_way_ends_its_own_job(real: RealWorker) -> None:  # noqa: F811
    costly = pb.ResponseFormat(
        json_schema='{"type": "integer", "multipleOf": 99991, "minimum": 0, "maximum": 1000000000000000}'
    )
    neighbour = asyncio.ensure_future(generate(real, "neighbour", max_tokens=16, temperature=0))
    events, code = await rest(real.stub.Execute(request_of("a", response_format=costly, seed=1)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert [event.WhichOneof("event") for event in events][-2:] == ["metrics", "error"]
    assert (events[-1].error.code, events[-1].error.message[:16]) == ("INVALID_REQUEST", "response_format:")
    assert len(ids_of(await neighbour)) == 16
