"""Bodies of OpenAI's completions and chat completions, as a request for the worker."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenwire.gateway.context import Gateway
from tokenwire.gateway.fields import Fields, checked_request, is_integer, sampling
from tokenwire.rpc.response_format import ResponseFormat
from tokenwire.rpc.validate import RawRequest
from tokenwire.v1 import inference_pb2 as pb

DEFAULT_COMPLETION_TOKENS = 16
"""What OpenAI's completions generate when `max_tokens` is absent."""

# Fields of OpenAI's that this product lacks, and the values that ask for nothing beyond what it does.
LACKING_IN_CHAT: dict[str, tuple[object, ...]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": ("none",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
LACKING_IN_COMPLETIONS: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "n": (1,),
    "suffix": ("",),
}
# Fields that say something about the caller and change nothing about the answer.
WITHOUT_EFFECT = ("metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "user")

_MESSAGE_FIELDS = {"role", "content"}
_ROLES = {"developer": "system"}


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A parsed body.

    Attributes:
        message: for the worker; its job id is the completion's id.
        model: the model that was asked for; None for whichever is served.
        renamed: from a field's name in `message` to the client's.
    """

    message: pb.ExecuteRequest
    model: str | None
    is_chat: bool
    stream: bool
    include_usage: bool
    logprobs: bool
    renamed: Callable[[str], str]


def parse_chat(body: Mapping[str, Any], gateway: Gateway) -> CompletionRequest:
    """Raises TokenwireError: INVALID_REQUEST with every violation."""
    fields = Fields(body)
    values = sampling(fields)
    limit = fields.integer("max_completion_tokens")
    limit_name = "max_tokens" if limit is None else "max_completion_tokens"
    if limit is not None:
        values["max_tokens"] = limit
    wants_logprobs = fields.boolean("logprobs") or False
    top = fields.integer("top_logprobs")
    if top is not None and not wants_logprobs:
        fields.refuse("top_logprobs", "DEPENDS", "with(logprobs)", "needs logprobs to be true")
    raw = RawRequest(
        job_id=f"chatcmpl-{uuid.uuid4().hex}",
        chat=_messages(fields),
        logprobs=(top or 0) if wants_logprobs else None,
        response_format=_response_format(fields),
        **values,
    )

    def renamed(name: str) -> str:
        named = {"max_tokens": limit_name, "logprobs": "top_logprobs", "chat": "messages"}
        return named.get(name) or name.removeprefix("chat.")

    return _finish(fields, raw, LACKING_IN_CHAT, gateway, renamed, is_chat=True)


def parse_completion(body: Mapping[str, Any], gateway: Gateway) -> CompletionRequest:
    """Raises TokenwireError: INVALID_REQUEST with every violation."""
    fields = Fields(body)
    prompt, ids = _prompt(fields)
    values = sampling(fields)
    if values["max_tokens"] is None:
        values["max_tokens"] = DEFAULT_COMPLETION_TOKENS
    raw = RawRequest(
        job_id=f"cmpl-{uuid.uuid4().hex}",
        prompt=prompt,
        prompt_tokens=ids,
        logprobs=fields.integer("logprobs"),
        response_format=_response_format(fields),
        **values,
    )

    def renamed(name: str) -> str:
        return "prompt" + name.removeprefix("prompt_tokens").removeprefix(".ids") if _is_prompt(name) else name

    return _finish(fields, raw, LACKING_IN_COMPLETIONS, gateway, renamed, is_chat=False)


def _is_prompt(name: str) -> bool:
    return name.startswith("prompt_tokens")


def _finish(
    fields: Fields,
    raw: RawRequest,
    lacking: Mapping[str, tuple[object, ...]],
    gateway: Gateway,
    renamed: Callable[[str], str],
    *,
    is_chat: bool,
) -> CompletionRequest:
    for name, harmless in lacking.items():
        value = fields.any(name)
        if value is not None and not any(value == item and type(value) is type(item) for item in harmless):
            fields.refuse(name, "UNSUPPORTED_FIELD", "absent", "is not supported here")
    for name in WITHOUT_EFFECT:
        fields.any(name)
    model = fields.string("model")
    stream = fields.boolean("stream") or False
    include_usage = _include_usage(fields, stream)
    gateway.count_unknown(fields.unknown)
    message = checked_request(fields, raw, gateway.limits(), renamed)
    return CompletionRequest(message, model, is_chat, stream, include_usage, raw.logprobs is not None, renamed)


def _include_usage(fields: Fields, stream: bool) -> bool:
    options = fields.any("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        fields.wrong_type("stream_options", "an object")
        return False
    if not stream:
        fields.refuse("stream_options", "DEPENDS", "with(stream)", "needs stream to be true")
    wanted = options.get("include_usage")
    if wanted is not None and not isinstance(wanted, bool):
        fields.wrong_type("stream_options.include_usage", "a boolean")
        return False
    return bool(wanted)


def _prompt(fields: Fields) -> tuple[str | None, list[int] | None]:
    """A text, the ids of its tokens, or a list with one of these."""
    value = fields.any("prompt")
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if value is None:
        fields.refuse("prompt", "REQUIRED", "present", "is required")
    elif isinstance(value, str):
        return value, None
    elif isinstance(value, list) and all(is_integer(item) for item in value):
        return None, value
    elif isinstance(value, list) and all(isinstance(item, str | list) for item in value):
        fields.refuse("prompt", "UNSUPPORTED_FIELD", "max_count(1)", "several prompts in one request are not supported")
    else:
        fields.wrong_type("prompt", "a string or a list of token ids")
    return "-", None  # stands in, so that it is not reported as missing too


def _messages(fields: Fields) -> list[tuple[str, str]]:
    messages = fields.any("messages")
    if not isinstance(messages, list):
        if messages is None:
            fields.refuse("messages", "REQUIRED", "present", "is required")
        else:
            fields.wrong_type("messages", "a list")
        return [("user", "-")]
    chat: list[tuple[str, str]] = []
    for place, message in enumerate(messages):
        name = f"messages[{place}]"
        if not isinstance(message, dict):
            fields.wrong_type(name, "an object")
            continue
        for extra in message.keys() - _MESSAGE_FIELDS:
            if message[extra] not in (None, []):
                fields.refuse(f"{name}.{extra[:64]}", "UNSUPPORTED_FIELD", "absent", "is not supported here")
        role = message.get("role")
        if not isinstance(role, str):
            fields.wrong_type(f"{name}.role", "a string")
            role = "user"
        chat.append((_ROLES.get(role, role), _content(fields, f"{name}.content", message.get("content"))))
    return chat


def _content(fields: Fields, name: str, content: object) -> str:
    """A text, or a list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        fields.wrong_type(name, "a string or a list of text parts")
        return ""
    texts = []
    for place, part in enumerate(content):
        if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, dict) and isinstance(part.get("type"), str) and part["type"] != "text":
            # Nothing is fetched, wherever it points.
            fields.refuse(f"{name}[{place}]", "UNSUPPORTED_CONTENT", "type(text)", "only text can be read")
        else:
            fields.wrong_type(f"{name}[{place}]", "a text part")
    return "".join(texts)


def _response_format(fields: Fields) -> ResponseFormat | None:
    wanted = fields.any("response_format")
    if wanted is None:
        return None
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return ResponseFormat("json_schema", '{"type":"object"}')
    if kind == "json_schema":
        outer = wanted["json_schema"] if isinstance(wanted.get("json_schema"), dict) else {}
        schema = outer.get("schema")
        if isinstance(schema, dict):
            return ResponseFormat("json_schema", json.dumps(schema))
        fields.wrong_type("response_format.json_schema.schema", "an object")
        return None
    constraint = "one_of(text, json_object, json_schema)"
    fields.refuse("response_format.type", "ONE_OF", constraint, "must be one of text, json_object, json_schema")
    return None
