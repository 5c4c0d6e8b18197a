"""The messages of the gateway's OpenAPI document. Bounds come from the validator's own table."""

from __future__ import annotations

from typing import Any

from tokenwire.bounds import JOB_ID_PATTERN, MAX_LOGIT_BIAS, MAX_LOGIT_BIASES, MAX_STOPS, ROLES, RULES
from tokenwire.errors import ERRORS
from tokenwire.gateway.errors import HTTP_ERRORS
from tokenwire.gateway.fields import INTEGERS
from tokenwire.gateway.openai.request import LACKING_IN_CHAT, LACKING_IN_COMPLETIONS

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
ATTACH_TOKEN: Schema = {"type": "string", "pattern": "^[A-Za-z0-9_-]{16,128}$"}
JOB_ID: Schema = {"type": "string", "pattern": f"^(?:{JOB_ID_PATTERN.pattern})$"}


def schemas() -> Schema:
    """Every message, by its name."""
    common = {**_sampling(), "logprobs": _rule("logprobs")}
    return {
        "ExecuteRequest": {
            "type": "object",
            "required": ["job_id"],
            "properties": {
                "job_id": JOB_ID,
                "prompt": _nullable({"type": "string", "description": "what to continue; or one of the next two"}),
                "prompt_tokens": _nullable({"type": "array", "items": {"type": "integer", "minimum": 0}}),
                "messages": _nullable({"type": "array", "minItems": 1, "items": ref("Message")}),
                **common,
                "detach": _nullable({"type": "boolean", "description": "keep the job when the client goes away"}),
                "attach_token": _nullable({**ATTACH_TOKEN, "description": "the secret to resume it with"}),
                "response_format": _nullable(ref("ResponseFormat")),
            },
        },
        "Message": {
            "type": "object",
            "required": ["role", "content"],
            "properties": {"role": {"enum": list(ROLES)}, "content": STRING},
        },
        "ResponseFormat": {
            "type": "object",
            "minProperties": 1,
            "maxProperties": 1,
            "properties": {"json_schema": {"type": ["object", "string", "boolean"]}, "regex": STRING},
            "additionalProperties": False,
        },
        "ExecuteEvent": {
            "type": "object",
            "description": "one frame of the stream; `id` is the index of the next token, `data` one line of JSON",
            "required": ["event", "id", "data"],
            "properties": {
                "event": {"enum": ["started", "token", "metrics", "end", "error"]},
                "id": {"type": "string", "pattern": "^[0-9]+$"},
                "data": STRING,
            },
        },
        "Chunk": {
            "type": "object",
            "description": "one frame of the stream; `data` is a chunk as JSON, an error, or `[DONE]`",
            "required": ["data"],
            "properties": {
                # The type of an event that names none (WHATWG HTML § 9.2.6).
                "event": {"enum": ["message", "error"]},
                "data": STRING,
            },
        },
        "CancelRequest": {"type": "object", "required": ["job_id"], "properties": {"job_id": JOB_ID}},
        "Cancelled": _object(
            job_id=STRING,
            outcome={"enum": ["cancelled", "already_finished", "not_found", "unknown"]},
            tokens_out={"type": "integer"},
        ),
        "ChatRequest": {
            "type": "object",
            "required": ["messages"],
            "properties": {
                **_openai_common(),
                "messages": {"type": "array", "minItems": 1, "items": ref("ChatMessage")},
                "max_completion_tokens": _rule("max_tokens"),
                "logprobs": _nullable({"type": "boolean"}),
                "top_logprobs": _rule("logprobs"),
                **{name: _only(values) for name, values in LACKING_IN_CHAT.items()},
            },
        },
        "ChatMessage": {
            "type": "object",
            "required": ["role", "content"],
            "properties": {
                "role": {"enum": [*ROLES, "developer"]},
                "content": {"anyOf": [STRING, {"type": "array", "items": ref("TextPart")}]},
            },
            "additionalProperties": False,
        },
        "TextPart": _object(type={"const": "text"}, text=STRING),
        "CompletionRequest": {
            "type": "object",
            "required": ["prompt"],
            "properties": {
                **_openai_common(),
                "prompt": {"anyOf": [STRING, {"type": "array", "items": {"type": "integer", "minimum": 0}}]},
                "logprobs": _rule("logprobs"),
                **{name: _only(values) for name, values in LACKING_IN_COMPLETIONS.items()},
            },
        },
        "Completion": _object(
            id=STRING,
            object={"enum": ["chat.completion", "text_completion"]},
            created={"type": "integer"},
            model=STRING,
            choices={"type": "array", "minItems": 1, "maxItems": 1, "items": {"type": "object"}},
            usage=ref("Usage"),
        ),
        "Usage": _object(
            prompt_tokens={"type": "integer"},
            completion_tokens={"type": "integer"},
            total_tokens={"type": "integer"},
            prompt_tokens_details=_object(cached_tokens={"type": "integer"}),
        ),
        "Models": _object(object={"const": "list"}, data={"type": "array", "items": ref("Model")}),
        "Model": _object(
            id=STRING,
            object={"const": "model"},
            created={"type": "integer"},
            owned_by=STRING,
            context_length={"type": "integer"},
        ),
        "Health": {
            "type": "object",
            "required": ["status"],
            "properties": {"status": {"enum": ["healthy", "degraded", "unhealthy"]}},
        },
        "Probe": {"type": "object", "required": ["status"], "properties": {"status": STRING}},
        "Error": _object(
            error={
                "type": "object",
                "required": ["code", "message", "retriable", "correlation_id"],
                "properties": {
                    "code": {"enum": sorted({*ERRORS, *HTTP_ERRORS})},
                    "message": STRING,
                    "retriable": {"type": "boolean"},
                    "correlation_id": STRING,
                    "details": {"type": "object"},
                },
            }
        ),
        "OpenAiError": _object(
            error={
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": STRING,
                    "type": STRING,
                    "param": {"type": ["string", "null"]},
                    "code": STRING,
                },
            }
        ),
    }


def _sampling() -> Schema:
    names = [rule.field for rule in RULES if rule.field != "logprobs"]
    bias = {"type": "number", "minimum": -MAX_LOGIT_BIAS, "maximum": MAX_LOGIT_BIAS}
    return {
        **{name: _rule(name) for name in names},
        "stop": _nullable(
            {"anyOf": [STRING, {"type": "array", "maxItems": MAX_STOPS, "items": {"type": "string", "minLength": 1}}]}
        ),
        "logit_bias": _nullable(
            {
                "type": "object",
                "maxProperties": MAX_LOGIT_BIASES,
                "propertyNames": {"pattern": "^[0-9]{1,20}$"},
                "additionalProperties": bias,
            }
        ),
        "cache_salt": _nullable({"type": "string", "minLength": 1, "maxLength": 128}),
    }


def _rule(name: str) -> Schema:
    """A number's bounds; those that depend on settings or the model are left to the worker."""
    rule = next(rule for rule in RULES if rule.field == name)
    schema: Schema = {"type": "integer" if name in (*INTEGERS, "logprobs") else "number"}
    schema["exclusiveMinimum" if rule.open_low else "minimum"] = rule.low
    if isinstance(rule.high, int):
        schema["maximum"] = rule.high
    schema["description"] = f"unset: {rule.default}"
    return _nullable(schema)


def _openai_common() -> Schema:
    return {
        **_sampling(),
        "model": _nullable({"type": "string", "description": "unset: whichever is served"}),
        "stream": _nullable({"type": "boolean"}),
        "stream_options": _nullable({"type": "object", "properties": {"include_usage": {"type": ["boolean", "null"]}}}),
        "response_format": _nullable(
            {
                "type": "object",
                "required": ["type"],
                "properties": {"type": {"enum": ["text", "json_object", "json_schema"]}},
            }
        ),
        "user": {"description": "without effect"},
        "metadata": {"description": "without effect"},
    }


def _only(values: tuple[object, ...]) -> Schema:
    """A field of OpenAI's that is lacking: absent, or with a value that asks for nothing."""
    return {"enum": [*values, None], "description": "not supported beyond these values"}


def _nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "required": list(properties), "properties": properties}


def ref(name: str) -> Schema:
    """Points to one of `schemas`."""
    return {"$ref": f"#/components/schemas/{name}"}
