"""Bounds of requests, each at its edges, on plain values."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenwire.bounds import MAX_LOGIT_BIASES, RULES, Rule, markdown_tables
from tokenwire.config_sources import load_settings
from tokenwire.errors import TokenwireError
from tokenwire.rpc.context import fit_context
from tokenwire.rpc.response_format import ResponseFormat
from tokenwire.rpc.validate import Limits, RawRequest, check_request

DOCS = Path(__file__).parents[2] / "docs" / "limits.md"
LIMITS = Limits(
    max_prompt_chars=100,
    max_chat_messages=4,
    max_tokens_in=0,
    max_tokens_out=50,
    vocab_size=300,
    context_length=64,
    max_token_bytes=8,
)
GOOD = RawRequest(job_id="a", prompt="x")


def refused(request: RawRequest, limits: Limits = LIMITS) -> list[tuple[str, str]]:
    try:
        check_request(request, limits, len)
    except TokenwireError as error:
        return [(violation.field, violation.reason) for violation in error.fields] or [("", error.code)]
    return []


def with_(**fields: Any) -> RawRequest:
    return dataclasses.replace(GOOD, **fields)


def test_the_tables_in_the_documentation_are_these() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for name, table in markdown_tables(load_settings(environ={})).items():
        assert f"<!-- begin {name} -->\n\n{table}\n<!-- end {name} -->" in text, "run scripts/limits_doc.py"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.field)
def test_each_number_is_accepted_inside_and_refused_outside_its_bounds(rule: Rule) -> None:
    high = rule.most(LIMITS)
    inside = [rule.low + 1 if rule.open_low and high > 1 else high, high]
    outside: list[float] = [rule.low - 1, high + 1]
    (outside if rule.open_low else inside).append(rule.low)
    for value in inside:
        assert refused(with_(**{rule.field: value})) == [], value
    for value in outside:
        assert refused(with_(**{rule.field: value})) == [(rule.field, "RANGE")], value
    assert refused(with_(**{rule.field: None})) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.field)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_must_be_finite(rule: Rule, value: float) -> None:
    assert refused(with_(**{rule.field: value})) == [(rule.field, "FINITE")]


@pytest.mark.parametrize("value", [10**400, -(10**400), 10**5000], ids=["large", "negative", "huge"])
def test_a_huge_integer_is_out_of_range_and_not_spelled_out(value: int) -> None:
    with pytest.raises(TokenwireError) as caught:
        check_request(with_(seed=value), LIMITS, len)
    assert len(caught.value.fields[0].message) < 120


def test_negative_zero_is_zero() -> None:
    assert refused(with_(temperature=-0.0, min_p=-0.0)) == []
    assert refused(with_(top_p=-0.0)) == [("top_p", "RANGE")]


@pytest.mark.parametrize(
    "inputs", [{}, {"prompt": "x", "prompt_tokens": [1]}, {"prompt": "x", "chat": [("user", "x")]}]
)
def test_exactly_one_input(inputs: dict[str, Any]) -> None:
    names = [field for field, reason in refused(RawRequest(job_id="a", **inputs)) if reason == "ONE_OF"]
    assert names == (list(inputs) or ["prompt", "prompt_tokens", "chat"])


@pytest.mark.parametrize("chars", [1, 100])
def test_prompt_length_counts_characters_not_bytes(chars: int) -> None:
    assert refused(with_(prompt="\U0001f600" * chars)) == []
    assert refused(with_(prompt="\U0001f600" * (chars + 100))) == [("prompt", "PROMPT_TOO_LARGE")]


def test_control_characters_are_text() -> None:
    assert refused(with_(prompt="a\x00b\r\n\u2028")) == []


def test_chat_counts_the_characters_of_all_turns() -> None:
    chat = [("user", "x" * 60), ("assistant", "x" * 41)]
    assert refused(RawRequest(job_id="a", chat=chat)) == [("chat.messages", "PROMPT_TOO_LARGE")]


def test_every_unknown_role_is_named() -> None:
    chat = [("user", "x"), ("tool", "x"), ("", "x")]
    assert [field for field, _ in refused(RawRequest(job_id="a", chat=chat))] == [
        "chat.messages[1].role",
        "chat.messages[2].role",
    ]


def test_stop_strings_are_counted_in_tokens_but_huge_ones_never_reach_the_tokenizer() -> None:
    seen = []

    def count(text: str) -> int:
        seen.append(text)
        return len(text)

    check_request(with_(stop=["x" * 32]), LIMITS, count)
    for stop, counted in (("x" * 33, True), ("x" * (32 * 8 + 1), False)):
        seen.clear()
        with pytest.raises(TokenwireError):
            check_request(with_(stop=[stop]), LIMITS, count)
        assert bool(seen) == counted


def test_lists_of_errors_stay_short() -> None:
    assert len(refused(RawRequest(job_id="a", prompt_tokens=[999] * 10_000))) <= 32
    assert len(refused(with_(logit_bias={n + 300: math.nan for n in range(MAX_LOGIT_BIASES)}))) <= 2 * MAX_LOGIT_BIASES


@pytest.mark.parametrize(("salt", "fields"), [(None, []), ("a", []), ("é" * 128, []), ("", ["cache_salt"])])
def test_a_salt_is_not_empty(salt: str | None, fields: list[str]) -> None:
    assert [field for field, _ in refused(with_(cache_salt=salt))] == fields


def test_a_salt_is_never_shown() -> None:
    with pytest.raises(TokenwireError) as caught:
        check_request(with_(cache_salt="secret" * 100), LIMITS, len)
    assert "secret" not in repr(caught.value.fields)


def test_all_violations_come_at_once() -> None:
    request = RawRequest(job_id="!", max_tokens=0, temperature=3.0, top_p=0.0, stop=[""], logit_bias={300: 0.0})
    fields = [field for field, _ in refused(request)]
    assert {"job_id", "prompt", "max_tokens", "temperature", "top_p", "stop[0]", "logit_bias[300]"} <= set(fields)


@given(
    st.builds(
        RawRequest,
        job_id=st.text(max_size=5),
        prompt=st.none() | st.text(max_size=200),
        prompt_tokens=st.none() | st.lists(st.integers(-5, 400), max_size=5),
        chat=st.none() | st.lists(st.tuples(st.text(max_size=9), st.text(max_size=9)), max_size=6),
        max_tokens=st.none() | st.integers(),
        temperature=st.none() | st.floats() | st.integers(),
        top_p=st.none() | st.floats(),
        top_k=st.none() | st.integers(),
        seed=st.none() | st.integers(),
        stop=st.lists(st.text(max_size=40), max_size=6),
        logit_bias=st.dictionaries(st.integers(-5, 400), st.floats(), max_size=5),
        priority=st.none() | st.integers(),
        cache_salt=st.none() | st.text(max_size=200),
        response_format=st.none()
        | st.builds(ResponseFormat, st.sampled_from(["", "json_schema", "regex"]), st.text(max_size=20)),
    )
)
def test_any_request_is_accepted_or_refused_with_typed_violations(request: RawRequest) -> None:
    for field, reason in refused(request):
        assert field
        assert reason.isupper()


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "expected"), [(1, None, 50), (60, None, 4), (63, None, 1), (63, 1, 1), (14, 50, 50)]
)
def test_what_fits_the_context_is_granted(prompt: int, max_tokens: int | None, expected: int) -> None:
    assert fit_context(prompt, max_tokens, LIMITS, "prompt") == expected


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "actual"), [(64, None, 65), (64, 1, 65), (15, 50, 65), (1000, 1, 1001)]
)
def test_what_does_not_fit_is_refused_with_its_size(prompt: int, max_tokens: int | None, actual: int) -> None:
    with pytest.raises(TokenwireError) as caught:
        fit_context(prompt, max_tokens, LIMITS, "prompt")
    error = caught.value
    assert (error.code, error.limit, error.actual) == ("CONTEXT_LENGTH_EXCEEDED", 64, actual)


def test_a_smaller_prompt_limit_holds_too() -> None:
    limits = dataclasses.replace(LIMITS, max_tokens_in=10)
    assert fit_context(10, 1, limits, "prompt") == 1
    with pytest.raises(TokenwireError) as caught:
        fit_context(11, 1, limits, "prompt")
    assert (caught.value.limit, caught.value.actual) == (10, 11)


def test_a_prompt_of_no_tokens_is_empty() -> None:
    with pytest.raises(TokenwireError) as caught:
        fit_context(0, 1, LIMITS, "chat.messages")
    assert [(violation.field, violation.reason) for violation in caught.value.fields] == [
        ("chat.messages", "PROMPT_EMPTY")
    ]
