"""The OpenAPI document of the gateway, served at `/openapi.json`. Bounds come from the validator's own table."""

from __future__ import annotations

import json
from typing import Any

from tokenwire._version import __version__
from tokenwire.bounds import JOB_ID_PATTERN, MAX_LOGIT_BIAS, MAX_LOGIT_BIASES, MAX_STOPS, ROLES, RULES
from tokenwire.errors import ERRORS
from tokenwire.gateway.asgi import Receive, Scope, Send, respond
from tokenwire.gateway.errors import HTTP_ERRORS
from tokenwire.gateway.fields import INTEGERS
from tokenwire.gateway.openai.request import LACKING_IN_CHAT, LACKING_IN_COMPLETIONS

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
_ATTACH_TOKEN: Schema = {"type": "string", "pattern": "^[A-Za-z0-9_-]{16,128}$"}
_JOB_ID: Schema = {"type": "string", "pattern": f"^(?:{JOB_ID_PATTERN.pattern})$"}


class OpenApi:
    def __init__(self) -> None:
        self._content = json.dumps(document()).encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, 200, self._content)


def document() -> Schema:
    """The whole document. A path's statuses are all that it can answer with."""
    execute = _operation("Generate, as server-sent events", "ExecuteRequest", _events("ExecuteEvent"), tag="execute")
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "tokenwire",
            "version": __version__,
            "description": "Streaming text generation. The same over gRPC: tokenwire.v1.Inference.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "security": [{}, {"key": []}, {"bearer": []}],
        "paths": {
            "/execute": {"post": execute},
            "/v2/execute": {"post": {**execute, "summary": "The same as /execute"}},
            "/execute/{job_id}": {"get": _attach()},
            "/cancel": {"post": _operation("Stop a job; idempotent", "CancelRequest", _json("Cancelled"), 202)},
            "/v1/models": {"get": _get("The models served", _json("Models"), tag="openai")},
            "/v1/models/{model}": {"get": _model()},
            "/v1/completions": {"post": _completion("CompletionRequest")},
            "/v1/chat/completions": {"post": _completion("ChatRequest")},
            "/metrics": {"get": _get("Metrics for Prometheus", {"text/plain": {"schema": STRING}})},
            "/health": {"get": _probe("The worker's state", "Health")},
            "/health/live": {"get": _probe("200 while the process lives", "Probe")},
            "/health/ready": {"get": _probe("200 while requests are taken", "Probe")},
            "/health/startup": {"get": _probe("200 once a model is loaded", "Probe")},
        },
        "components": {"schemas": _schemas(), "securitySchemes": _SECURITY_SCHEMES},
    }


_SECURITY_SCHEMES: Schema = {
    "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    "bearer": {"type": "http", "scheme": "bearer"},
}


def _schemas() -> Schema:
    common = {**_sampling(), "logprobs": _rule("logprobs")}
    return {
        "ExecuteRequest": {
            "type": "object",
            "required": ["job_id"],
            "properties": {
                "job_id": _JOB_ID,
                "prompt": _nullable({"type": "string", "description": "what to continue; or one of the next two"}),
                "prompt_tokens": _nullable({"type": "array", "items": {"type": "integer", "minimum": 0}}),
                "messages": _nullable({"type": "array", "minItems": 1, "items": _ref("Message")}),
                **common,
                "detach": _nullable({"type": "boolean", "description": "keep the job when the client goes away"}),
                "attach_token": _nullable({**_ATTACH_TOKEN, "description": "the secret to resume it with"}),
                "response_format": _nullable(_ref("ResponseFormat")),
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
        "CancelRequest": {"type": "object", "required": ["job_id"], "properties": {"job_id": _JOB_ID}},
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
                "messages": {"type": "array", "minItems": 1, "items": _ref("ChatMessage")},
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
                "content": {"anyOf": [STRING, {"type": "array", "items": _ref("TextPart")}]},
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
            usage=_ref("Usage"),
        ),
        "Usage": _object(
            prompt_tokens={"type": "integer"},
            completion_tokens={"type": "integer"},
            total_tokens={"type": "integer"},
            prompt_tokens_details=_object(cached_tokens={"type": "integer"}),
        ),
        "Models": _object(object={"const": "list"}, data={"type": "array", "items": _ref("Model")}),
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


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(name: str) -> Schema:
    return {"application/json": {"schema": _ref(name)}}


def _events(name: str) -> Schema:
    return {"text/event-stream": {"schema": _ref(name)}}


def _refusals(statuses: tuple[int, ...], name: str = "Error") -> Schema:
    return {str(status): {"description": "refused", "content": _json(name)} for status in statuses}


_EXAMPLES: dict[str, Schema] = {
    "ExecuteRequest": {"job_id": "story-1", "prompt": "Once upon a time", "max_tokens": 16, "seed": 7},
    "CancelRequest": {"job_id": "story-1"},
    "CompletionRequest": {"prompt": "Once upon a time", "max_tokens": 16, "stream": True},
    "ChatRequest": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16, "stream": True},
}

# What any path may answer with; a body adds its own.
_ALWAYS = (400, 401, 403, 404, 405, 406, 408, 421, 429, 431, 500, 503)
_WITH_BODY = (409, 413, 415, 501, 504)


def _operation(
    summary: str, body: str, content: Schema, status: int = 200, *, tag: str = "execute", error: str = "Error"
) -> Schema:
    return {
        "summary": summary,
        "tags": [tag],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _ref(body), "examples": {"short": {"value": _EXAMPLES[body]}}}},
        },
        "responses": {
            str(status): {"description": "accepted", "content": content},
            **_refusals((*_ALWAYS, *_WITH_BODY), error),
        },
    }


def _get(summary: str, content: Schema, *, tag: str = "operations") -> Schema:
    error = "OpenAiError" if tag == "openai" else "Error"
    responses = {"200": {"description": "the answer", "content": content}, **_refusals(_ALWAYS, error)}
    return {"summary": summary, "tags": [tag], "responses": responses}


def _attach() -> Schema:
    operation = _get("Take the stream of a detached job up again", _events("ExecuteEvent"), tag="execute")
    operation["responses"].update(_refusals((409,)))
    operation["parameters"] = [
        {"name": "job_id", "in": "path", "required": True, "schema": _JOB_ID},
        {"name": "from", "in": "query", "schema": {"type": "integer", "minimum": 0, "maximum": 2**32 - 1}},
        {"name": "token", "in": "query", "schema": _ATTACH_TOKEN, "description": "or in the header x-attach-token"},
    ]
    return operation


def _model() -> Schema:
    operation = _get("One model", _json("Model"), tag="openai")
    operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": STRING}]
    return operation


def _completion(body: str) -> Schema:
    content = {**_json("Completion"), **_events("Chunk")}
    return _operation("Complete, whole or as a stream", body, content, tag="openai", error="OpenAiError")


def _probe(summary: str, name: str) -> Schema:
    operation = _get(summary, _json(name))
    operation["responses"]["503"] = {"description": "not now", "content": _json(name)}
    return operation
