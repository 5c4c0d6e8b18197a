"""What arrives malformed and what goes wrong inside: typed statuses, correlation ids, no secrets told."""

from __future__ import annotations

import asyncio
import gzip
import re
import uuid
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from tokenwire.v1 import inference_pb2 as pb

Request = Callable[..., pb.ExecuteRequest]
EXECUTE = "/tokenwire.v1.Inference/Execute"
CANCEL = "/tokenwire.v1.Inference/Cancel"


async def failure_of(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(call.read() if hasattr(call, "read") else call, 20)
    error: grpc.aio.AioRpcError = caught.value
    return error


def violations(error: grpc.aio.AioRpcError) -> list[error_details_pb2.BadRequest.FieldViolation]:
    status = rpc_status.from_call(error)
    assert status is not None, "the status has no details"
    for detail in status.details:
        bad_request = error_details_pb2.BadRequest()
        if detail.Unpack(bad_request):
            return list(bad_request.field_violations)
    return []


def error_info(error: grpc.aio.AioRpcError) -> error_details_pb2.ErrorInfo:
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    assert status is not None
    assert any(detail.Unpack(info) for detail in status.details)
    return info


def raw(worker: Any, data: bytes, method: str = EXECUTE) -> Any:
    make = worker.channel.unary_unary if method == CANCEL else worker.channel.unary_stream
    return make(method, None, None)(data, timeout=20)


NESTED = b"\x2b" * 110 + b"\x2c" * 110  # an unknown group in a group, 110 deep


@pytest.mark.parametrize("method", [EXECUTE, CANCEL])
@pytest.mark.parametrize(
    "data",
    [b"\xff\xff\xff\xff", b"\x0a\x02\xff\xfe", b"\x0a\x05ab", NESTED],
    ids=["R1-no-message", "R2-bad-utf8", "truncated", "R3-nesting"],
)
async def test_a_message_that_does_not_parse_is_invalid(worker: Any, method: str, data: bytes) -> None:
    error = await failure_of(raw(worker, data, method))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.reason for violation in violations(error)] == ["MALFORMED_PROTO"]
    assert error_info(error).reason == "INVALID_REQUEST"
    assert "DecodeError" not in error.details()


@pytest.mark.parametrize("data", [b"", b"\xf8\x7f\x01"], ids=["R4-empty", "R5-unknown-fields"])
async def test_an_empty_request_is_told_all_that_is_missing(worker: Any, data: bytes) -> None:
    error = await failure_of(raw(worker, data))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in violations(error)] == ["job_id", "prompt", "prompt_tokens", "chat"]


async def test_a_message_beyond_the_limit_is_refused_by_size(worker: Any) -> None:
    error = await failure_of(raw(worker, b"\x12" + b"x" * (4 * 2**20)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_compression_bomb_is_refused_by_its_inflated_size(worker: Any) -> None:
    assert len(gzip.compress(bytes(64 * 2**20), 1)) < 4 * 2**20
    call = worker.channel.unary_stream(EXECUTE, None, None)(
        bytes(64 * 2**20), timeout=20, compression=grpc.Compression.Gzip
    )
    assert (await failure_of(call)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("method", ["/tokenwire.v1.Inference/Nothing", "/no.such.Service/Execute"])
async def test_an_unknown_method_is_unimplemented(worker: Any, method: str) -> None:
    assert (await failure_of(raw(worker, b"", method))).code() is grpc.StatusCode.UNIMPLEMENTED


async def test_metadata_beyond_the_hard_limit_is_refused(worker: Any, request_of: Request) -> None:
    call = worker.stub.Execute(request_of(), metadata=(("x-large", "x" * 20_000),))
    assert (await failure_of(call)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("key", ["x-correlation-id", "x-request-id"])
async def test_the_correlation_id_comes_back_on_every_kind_of_answer(
    worker: Any, request_of: Request, key: str
) -> None:
    worker.fake.eager = True
    sent = ((key, "Trace.1_a-Z"),)
    stream = worker.stub.Execute(request_of(), metadata=sent)
    assert (await stream.read()).HasField("started")
    while await stream.read() is not grpc.aio.EOF:
        pass
    unary = worker.stub.Cancel(pb.CancelRequest(job_id="x"), metadata=sent)
    await unary
    for call in (stream, unary):
        assert dict(await call.initial_metadata())["x-correlation-id"] == "Trace.1_a-Z"
        assert dict(await call.trailing_metadata())["x-correlation-id"] == "Trace.1_a-Z"
    refused = worker.stub.Execute(request_of("", temperature=3), metadata=sent)
    await failure_of(refused)
    malformed = raw_with(worker, sent)
    await failure_of(malformed)
    for call in (refused, malformed):
        assert dict(await call.trailing_metadata())["x-correlation-id"] == "Trace.1_a-Z"


def raw_with(worker: Any, metadata: tuple[tuple[str, str], ...]) -> Any:
    return worker.channel.unary_stream(EXECUTE, None, None)(b"\xff", timeout=20, metadata=metadata)


@pytest.mark.parametrize("sent", [None, "", "a b", "x" * 65, "a/b", "a;DROP"])
async def test_a_correlation_id_that_is_not_well_formed_is_replaced(worker: Any, sent: str | None) -> None:
    metadata = () if sent is None else (("x-correlation-id", sent),)
    call = worker.stub.Cancel(pb.CancelRequest(job_id="x"), metadata=metadata)
    await call
    got = dict(await call.trailing_metadata())["x-correlation-id"]
    assert uuid.UUID(got).version == 4


async def test_twenty_wrong_fields_give_one_small_reply(worker: Any, request_of: Request) -> None:
    wrong = request_of(logit_bias={2000 + n: float("nan") for n in range(20)}, temperature=9, max_tokens=0)
    error = await failure_of(worker.stub.Execute(wrong))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    listed = violations(error)
    assert len(listed) == 16
    assert {"temperature", "max_tokens"} <= {violation.field for violation in listed}
    info = error_info(error)
    assert (info.metadata["truncated"], info.metadata["violations"]) == ("true", "42")
    assert len(dict(error.trailing_metadata())["grpc-status-details-bin"]) <= 4096


PRIVATE = "correct horse battery staple"


@pytest.mark.parametrize(
    ("fields", "field", "reason"),
    [
        ({"prompt": ""}, "prompt", "PROMPT_EMPTY"),
        ({"prompt": PRIVATE * 2000}, "prompt", "PROMPT_TOO_LARGE"),
        ({"chat": pb.Chat()}, "chat.messages", "PROMPT_EMPTY"),
        ({"chat": pb.Chat(messages=[pb.ChatMessage(role="user")])}, "chat.messages", "PROMPT_EMPTY"),
        ({"chat": pb.Chat(messages=[pb.ChatMessage(role="root", content=PRIVATE)])}, "chat.messages[0].role", "ONE_OF"),
        ({"chat": pb.Chat(messages=[pb.ChatMessage(role="user", content="x")] * 65)}, "chat.messages", "MAX_COUNT"),
        ({"prompt_tokens": pb.TokenIds()}, "prompt_tokens", "PROMPT_EMPTY"),
        ({"prompt_tokens": pb.TokenIds(ids=[1, 1000])}, "prompt_tokens.ids[1]", "VOCABULARY"),
        ({"max_tokens": 0}, "max_tokens", "RANGE"),
        ({"max_tokens": 2049}, "max_tokens", "RANGE"),
        ({"max_tokens": 2**31}, "max_tokens", "RANGE"),
        ({"temperature": float("nan")}, "temperature", "FINITE"),
        ({"temperature": float("inf")}, "temperature", "FINITE"),
        ({"temperature": -1}, "temperature", "RANGE"),
        ({"temperature": 1e30}, "temperature", "RANGE"),
        ({"top_p": 0}, "top_p", "RANGE"),
        ({"top_p": 1.0001}, "top_p", "RANGE"),
        ({"top_p": float("nan")}, "top_p", "FINITE"),
        ({"top_k": 1001}, "top_k", "RANGE"),
        ({"min_p": 1.5}, "min_p", "RANGE"),
        ({"repetition_penalty": 0}, "repetition_penalty", "RANGE"),
        ({"frequency_penalty": -2.5}, "frequency_penalty", "RANGE"),
        ({"presence_penalty": 2.5}, "presence_penalty", "RANGE"),
        ({"logprobs": 10**6}, "logprobs", "RANGE"),
        ({"logit_bias": {1000: 1.0}}, "logit_bias[1000]", "VOCABULARY"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias[5]", "FINITE"),
        ({"logit_bias": {5: 101.0}}, "logit_bias[5]", "RANGE"),
        ({"logit_bias": dict.fromkeys(range(301), 1.0)}, "logit_bias", "MAX_COUNT"),
        ({"stop": ["a"] * 5}, "stop", "MAX_COUNT"),
        ({"stop": ["a"] * 500_000}, "stop", "MAX_COUNT"),
        ({"stop": ["a", ""]}, "stop[1]", "NON_EMPTY"),
        ({"stop": ["x" * 33]}, "stop[0]", "LENGTH"),
        ({"stop": [PRIVATE * 40_000]}, "stop[0]", "LENGTH"),
        ({"priority": 3}, "priority", "RANGE"),
        ({"priority": -(2**31)}, "priority", "RANGE"),
        ({"cache_salt": ""}, "cache_salt", "LENGTH"),
        ({"cache_salt": PRIVATE * 5}, "cache_salt", "LENGTH"),
    ],
)
async def test_a_wrong_field_is_named_and_never_echoed(
    worker: Any, request_of: Request, fields: dict[str, Any], field: str, reason: str
) -> None:
    call = worker.stub.Execute(request_of(**fields))
    error = await failure_of(call)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert [(violation.field, violation.reason) for violation in violations(error)] == [(field, reason)]
    assert "horse" not in repr(error)
    assert worker.fake.jobs == []


@pytest.mark.parametrize("job_id", ["", "x" * 129, "a/b", "a b", "a\n", "../x", "аbc", "a\x00"])
@pytest.mark.parametrize("method", ["Execute", "Cancel"])
async def test_a_job_id_outside_its_alphabet_is_refused(
    worker: Any, request_of: Request, job_id: str, method: str
) -> None:
    message = request_of(job_id) if method == "Execute" else pb.CancelRequest(job_id=job_id)
    error = await failure_of(getattr(worker.stub, method)(message))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in violations(error)] == ["job_id"]


@pytest.mark.parametrize(
    ("fields", "limit", "actual"),
    [
        ({"prompt": "x" * 4096}, 4096, 4097),
        ({"prompt": "x" * 4000, "max_tokens": 97}, 4096, 4097),
        ({"prompt_tokens": pb.TokenIds(ids=[1] * 5000)}, 4096, 5001),
    ],
)
async def test_beyond_the_context_names_limit_and_actual(
    worker: Any, request_of: Request, fields: dict[str, Any], limit: int, actual: int
) -> None:
    error = await failure_of(worker.stub.Execute(request_of(**fields)))
    assert error.code() is grpc.StatusCode.OUT_OF_RANGE
    info = error_info(error)
    assert info.reason == "CONTEXT_LENGTH_EXCEEDED"
    assert (info.metadata["limit"], info.metadata["actual"]) == (str(limit), str(actual))


async def test_unset_max_tokens_is_capped_by_the_context_left(worker: Any, request_of: Request) -> None:
    worker.fake.eager = True
    call = worker.stub.Execute(request_of(prompt="x" * 4000))
    assert (await call.read()).HasField("started")
    assert worker.fake.jobs[0].spec["max_tokens"] == 96
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_no_refusal_names_a_path_or_a_type(worker: Any, request_of: Request) -> None:
    for data in (b"\xff", b"", b"\x0a\x02\xff\xfe"):
        text = repr((await failure_of(raw(worker, data))).details())
        assert not re.search(r"/|Error|Traceback|0x", text)
