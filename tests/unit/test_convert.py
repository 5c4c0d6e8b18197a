"""Messages to plain values and back."""

from __future__ import annotations

import pytest

from tokenwire.errors import ERRORS, TokenwireError
from tokenwire.rpc.convert import empty_metrics_event, error_event, raw_request
from tokenwire.rpc.response_format import ResponseFormat
from tokenwire.rpc.validate import Limits
from tokenwire.v1 import inference_pb2 as pb

LIMITS = Limits(100, 4, 0, 50, 300, 64, 8)


def test_unset_fields_are_none_and_zeros_are_zeros() -> None:
    unset = raw_request(pb.ExecuteRequest(job_id="a"), LIMITS)
    assert unset.prompt is unset.prompt_tokens is unset.chat is None
    assert unset.temperature is unset.seed is unset.max_tokens is unset.logprobs is None
    zeros = raw_request(pb.ExecuteRequest(prompt="", temperature=0, seed=0, max_tokens=0, logprobs=0), LIMITS)
    assert (zeros.prompt, zeros.temperature, zeros.seed, zeros.max_tokens, zeros.logprobs) == ("", 0, 0, 0, 0)


def test_every_sampling_field_of_the_message_is_read() -> None:
    numbers = {field.name for field in pb.ExecuteRequest.DESCRIPTOR.fields if field.has_presence}
    numbers -= {"prompt", "prompt_tokens", "chat", "cache_salt", "response_format", "attach_token"}
    request = pb.ExecuteRequest(
        **dict.fromkeys(numbers, 1),
        stop=["x"],
        logit_bias={1: 2.0},
        attach_token="t",  # noqa: S106
    )
    raw = raw_request(request, LIMITS)
    assert raw.attach_token == "t"  # noqa: S105
    assert {name for name in numbers if getattr(raw, name) == 1} == numbers
    assert (list(raw.stop), dict(raw.logit_bias)) == (["x"], {1: 2.0})


def test_texts_are_read_and_unset_differs_from_empty() -> None:
    regex = pb.ExecuteRequest(cache_salt="s", response_format=pb.ResponseFormat(regex="a"))
    raw = raw_request(regex, LIMITS)
    assert (raw.cache_salt, raw.response_format) == ("s", ResponseFormat("regex", "a"))
    empty = raw_request(pb.ExecuteRequest(cache_salt="", response_format=pb.ResponseFormat()), LIMITS)
    assert (empty.cache_salt, empty.response_format) == ("", ResponseFormat("", ""))
    unset = raw_request(pb.ExecuteRequest(), LIMITS)
    assert unset.cache_salt is unset.response_format is None


def test_lists_beyond_their_bound_are_cut_one_past_it() -> None:
    request = pb.ExecuteRequest(stop=["x"] * 1000, logit_bias=dict.fromkeys(range(1000), 0.0))
    request.chat.messages.extend([pb.ChatMessage(role="user")] * 1000)
    raw = raw_request(request, LIMITS)
    assert raw.chat is not None
    assert (len(raw.stop), len(raw.logit_bias), len(raw.chat)) == (5, 301, 5)


def test_token_ids_beyond_the_context_are_refused_before_they_are_copied() -> None:
    with pytest.raises(TokenwireError, match="CONTEXT_LENGTH_EXCEEDED"):
        raw_request(pb.ExecuteRequest(prompt_tokens=pb.TokenIds(ids=[1] * 64)), LIMITS)


@pytest.mark.parametrize("code", sorted(ERRORS))
def test_an_error_event_says_code_message_and_retriable(code: str) -> None:
    event = pb.ExecuteEvent.FromString(error_event(TokenwireError(code)))
    assert (event.error.code, event.error.message) == (code, ERRORS[code].message)
    assert event.error.retriable == ERRORS[code].retriable
    assert event.error.HasField("resume") == (event.error.retriable or code == "SLOW_CONSUMER")


def test_an_error_event_says_where_to_go_on() -> None:
    """A-2: after the last token sent; where none was, at the first that was wanted."""
    last = pb.ExecuteEvent(token=pb.Token(t="ab", i=3, ids=[7, 8], digest="0123")).SerializeToString()
    for event, wanted in (
        (error_event(TokenwireError("UNAVAILABLE"), last, 2), pb.ResumePoint(from_index=5, digest="0123")),
        (error_event(TokenwireError("UNAVAILABLE"), None, 2), pb.ResumePoint(from_index=2)),
    ):
        assert pb.ExecuteEvent.FromString(event).error.resume == wanted


def test_an_empty_metrics_event_counts_the_prompt() -> None:
    event = pb.ExecuteEvent.FromString(empty_metrics_event(7))
    assert (event.metrics.tokens_in, event.metrics.tokens_out) == (7, 0)
