"""The OpenAPI document of the gateway, served at `/openapi.json`: its paths. The messages are in openapi_schemas.py."""

from __future__ import annotations

import json

from tokenwire._version import __version__
from tokenwire.gateway.asgi import Receive, Scope, Send, respond
from tokenwire.gateway.openapi_schemas import ATTACH_TOKEN, JOB_ID, STRING, Schema, ref, schemas


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
        "components": {"schemas": schemas(), "securitySchemes": _SECURITY_SCHEMES},
    }


_SECURITY_SCHEMES: Schema = {
    "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    "bearer": {"type": "http", "scheme": "bearer"},
}


def _json(name: str) -> Schema:
    return {"application/json": {"schema": ref(name)}}


def _events(name: str) -> Schema:
    return {"text/event-stream": {"schema": ref(name)}}


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
            "content": {"application/json": {"schema": ref(body), "examples": {"short": {"value": _EXAMPLES[body]}}}},
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
        {"name": "job_id", "in": "path", "required": True, "schema": JOB_ID},
        {"name": "from", "in": "query", "schema": {"type": "integer", "minimum": 0, "maximum": 2**32 - 1}},
        {"name": "token", "in": "query", "schema": ATTACH_TOKEN, "description": "or in the header x-attach-token"},
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
