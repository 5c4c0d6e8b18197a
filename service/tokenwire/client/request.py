"""How a call is made: the request from typed parameters, the channel's options, the call's metadata."""

from __future__ import annotations

import json
import secrets
import uuid
from collections.abc import Mapping, Sequence
from typing import TypedDict

from tokenwire.v1 import inference_pb2 as pb

DEFAULT_TARGET = "127.0.0.1:50051"
HEALTH_TIMEOUT_S = 5.0
CANCEL_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 1.0

# Keepalive finds a silent peer within 30 + 10 s; a worker allows a ping every 10 s.
_CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    # A worker that restarts is found again soon; gRPC's own 1 to 120 s would outlast what resuming waits for.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.max_receive_message_length", 4 * 1024 * 1024),
    ("grpc.max_send_message_length", 4 * 1024 * 1024),
    ("grpc.primary_user_agent", "tokenwire-client"),
)


class Message(TypedDict):
    """One turn of a conversation; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


class ResponseFormat(TypedDict, total=False):
    """What the answer must be; exactly one key. A JSON schema may be given as its text or as a mapping."""

    json_schema: str | Mapping[str, object]
    regex: str


class SamplingParams(TypedDict, total=False):
    """The optional parameters of a generation, as in `ExecuteRequest`. One that is absent or None stays unset."""

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    stop: Sequence[str] | None
    seed: int | None
    logit_bias: Mapping[int, float] | None
    logprobs: int | None
    priority: int | None
    cache_salt: str | None
    response_format: ResponseFormat | None


def channel_options(target: str, extra: Sequence[tuple[str, int | str]]) -> list[tuple[str, int | str]]:
    """The options of a channel to `target`; `extra` comes last and wins."""
    options = list(_CHANNEL_OPTIONS)
    if target.startswith(("127.", "localhost:", "[::1]:", "unix:")):
        # A proxy set for the outside world cannot reach this machine's own loopback.
        options.append(("grpc.enable_http_proxy", 0))
    return [*options, *extra]


def build_request(
    prompt: str | None,
    messages: Sequence[Message] | None,
    token_ids: Sequence[int] | None,
    job_id: str | None,
    params: SamplingParams,
    *,
    detach: bool = False,
) -> pb.ExecuteRequest:
    """An `ExecuteRequest`; the worker validates the values, this only their types.

    Args:
        detach: keep the job if the connection breaks; draws the secret that attaching needs.

    Raises:
        ValueError: not exactly one of `prompt`, `messages`, `token_ids`, or a value that its wire type cannot hold.
        TypeError: a value of the wrong type, or an unknown parameter.
    """
    if sum(given is not None for given in (prompt, messages, token_ids)) != 1:
        raise ValueError("give exactly one of prompt, messages and token_ids")
    request = pb.ExecuteRequest(job_id=job_id or str(uuid.uuid4()))
    if prompt is not None:
        request.prompt = prompt
    elif messages is not None:
        request.chat.SetInParent()
        request.chat.messages.extend(pb.ChatMessage(**message) for message in messages)
    elif token_ids is not None:
        request.prompt_tokens.SetInParent()
        request.prompt_tokens.ids.extend(token_ids)
    if detach:
        request.detach = True
        request.attach_token = secrets.token_urlsafe()
    unknown = params.keys() - SamplingParams.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown parameter: {', '.join(sorted(unknown))}")
    stop = params.get("stop")
    if isinstance(stop, str):
        raise TypeError("stop is a sequence of strings, not one string")
    request.stop.extend(stop or ())
    request.logit_bias.update(params.get("logit_bias") or {})
    if (response_format := params.get("response_format")) is not None:
        _set_format(request.response_format, response_format)
    for name, value in params.items():
        if value is not None and name not in ("stop", "logit_bias", "response_format"):
            setattr(request, name, value)
    return request


def _set_format(message: pb.ResponseFormat, wanted: ResponseFormat) -> None:
    if wanted.keys() not in ({"json_schema"}, {"regex"}):
        raise ValueError("response_format has exactly one of json_schema and regex")
    schema = wanted.get("json_schema")
    if schema is not None:
        message.json_schema = schema if isinstance(schema, str) else json.dumps(schema)
    else:
        message.regex = wanted["regex"]


def call_metadata(extra: Sequence[tuple[str, str]], correlation_id: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata of one call; the worker draws a correlation id if none is given."""
    return (*extra, ("x-correlation-id", correlation_id)) if correlation_id is not None else tuple(extra)
