"""The status table: complete, consistent, documented, and small enough to arrive."""

from __future__ import annotations

import re
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2

from tokenwire.errors import ERRORS, FieldViolation, TokenwireError, from_outcome, invalid_request, markdown_table
from tokenwire.rpc.status import MAX_DETAILS_BYTES, MAX_VIOLATIONS, to_abort, to_proto

DOCS = Path(__file__).parents[2] / "docs" / "errors.md"


def test_every_row_is_well_formed() -> None:
    for code, row in ERRORS.items():
        assert code == row.code
        assert re.fullmatch(r"[A-Z0-9_]{1,63}", code)
        assert row.grpc_status in grpc.StatusCode.__members__
        assert row.pushback in ("none", "after", "never")
        assert row.message
        assert not row.message.endswith(".")


def test_the_table_in_the_documentation_is_this_one() -> None:
    assert markdown_table() in DOCS.read_text(encoding="utf-8")


@pytest.mark.parametrize("code", sorted(ERRORS))
def test_every_code_becomes_a_status_that_says_which(code: str) -> None:
    error = TokenwireError(code)
    status, message, trailers = to_abort(error)
    assert status.name == ERRORS[code].grpc_status
    assert message == ERRORS[code].message
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in to_proto(error).details)
    assert (info.reason, info.domain) == (code, "tokenwire")
    pushback = {"none": None, "after": "1000", "never": "-1"}[ERRORS[code].pushback]
    assert dict(trailers).get("grpc-retry-pushback-ms") == pushback


def test_a_chosen_delay_is_sent_as_retry_info() -> None:
    error = TokenwireError("OVERLOADED", retry_after_ms=2500)
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in to_proto(error).details)
    assert retry.retry_delay.ToMilliseconds() == 2500
    assert dict(to_abort(error)[2])["grpc-retry-pushback-ms"] == "2500"


@pytest.mark.parametrize("char", ["x", "é", "\U0001f600"])
def test_details_stay_small_however_long_the_texts_are(char: str) -> None:
    fields = [FieldViolation(char * 5000, "RANGE", "range(0..=1)", char * 5000) for _ in range(100)]
    error = TokenwireError("INVALID_REQUEST", char * 5000, fields=fields)
    proto = to_proto(error)
    assert proto.ByteSize() <= MAX_DETAILS_BYTES
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in proto.details)
    assert (info.metadata["truncated"], info.metadata["violations"]) == ("true", "100")


def test_sixteen_violations_of_usual_length_arrive_whole() -> None:
    fields = [
        FieldViolation(
            f"logit_bias[{n}]", "RANGE", "range(-100..=100)", "must be at least -100 and at most 100, not 101"
        )
        for n in range(MAX_VIOLATIONS)
    ]
    bad_request = error_details_pb2.BadRequest()
    proto = to_proto(invalid_request(fields))
    assert any(detail.Unpack(bad_request) for detail in proto.details)
    assert len(bad_request.field_violations) == MAX_VIOLATIONS
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in proto.details)
    assert "truncated" not in info.metadata


@pytest.mark.parametrize("code", ["INTERNAL", "CUDA_ERROR", "", "SOMETHING_ELSE"])
def test_inner_failures_keep_their_text_to_themselves(code: str) -> None:
    assert "secret" not in from_outcome(code, "secret").message


def test_other_failures_keep_their_text() -> None:
    assert from_outcome("KV_CAPACITY", "needs 9 of 8 blocks").message == "needs 9 of 8 blocks"
