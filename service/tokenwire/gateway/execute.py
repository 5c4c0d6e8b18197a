"""`POST /execute` and `POST /cancel`: the gRPC contract in JSON and server-sent events."""

from __future__ import annotations

import json
import urllib.parse
from typing import Any

from tokenwire.bounds import GRAMMARS
from tokenwire.errors import TokenwireError, invalid_request
from tokenwire.gateway.asgi import Receive, Scope, Send, header, respond
from tokenwire.gateway.body import read_json_object
from tokenwire.gateway.context import Gateway
from tokenwire.gateway.fields import Fields, checked_request, is_integer, sampling
from tokenwire.gateway.generation import Departure, attach_generation, start_generation
from tokenwire.gateway.sse import dumps, quoted, stream_events
from tokenwire.rpc.response_format import ResponseFormat
from tokenwire.rpc.validate import Limits, RawRequest, check_attach, check_job_id
from tokenwire.v1 import inference_pb2 as pb

_STOP_REASONS: dict[int, str] = {
    pb.STOP_REASON_EOS: "EOS",
    pb.STOP_REASON_MAX_TOKENS: "MAX_TOKENS",
    pb.STOP_REASON_STOP_SEQUENCE: "STOP_SEQUENCE",
}
_CANCEL_OUTCOMES: dict[int, str] = {
    pb.CancelResponse.OUTCOME_CANCELLED: "cancelled",
    pb.CancelResponse.OUTCOME_ALREADY_FINISHED: "already_finished",
    pb.CancelResponse.OUTCOME_NOT_FOUND: "not_found",
}


class Execute:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway = self._gateway
        refuse_resume(scope)
        body = await read_json_object(scope, receive, gateway.settings.http_max_body_bytes)
        request = parse_execute(body, gateway)
        async with Departure(receive) as departure:
            generation = await start_generation(
                gateway.pool, request, gateway.metadata(scope), departure, wait_s=gateway.heartbeat_s
            )
            await stream_events(send, generation, ExecuteFrames(), gateway.heartbeat_s)


class Attach:
    """`GET /execute/{job_id}?from=N`: the stream of a detached job, taken up again.

    The job's secret comes in the header `x-attach-token` or, for an `EventSource`, which cannot set one, as `token` in
    the query. `Last-Event-ID` beats `from`.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway = self._gateway
        query = dict(urllib.parse.parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
        job_id = scope["path_params"]["job_id"]
        token = header(scope, b"x-attach-token") or query.get("token", "")
        check_attach(job_id, token)
        name, first = "from", query.get("from", "0")
        if last := header(scope, b"last-event-id").strip():
            name, first = "Last-Event-ID", last
        if not (first.isascii() and first.isdigit() and len(first) <= 10 and int(first) < 2**32):
            fields = Fields({})
            fields.refuse(name, "RANGE", f"range(0..={2**32 - 1})", "must be the index of a token")
            raise invalid_request(fields.violations)
        request = pb.AttachRequest(job_id=job_id, from_index=int(first), attach_token=token)
        async with Departure(receive) as departure:
            generation = await attach_generation(
                gateway.pool, request, gateway.metadata(scope), departure, wait_s=gateway.heartbeat_s
            )
            await stream_events(send, generation, ExecuteFrames(int(first)), gateway.heartbeat_s)


class Cancel:
    """Always 202 for a well-formed id, whatever the cancel met; the body says what."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_json_object(scope, receive, self._gateway.settings.http_max_body_bytes)
        fields = Fields(body)
        job_id = fields.string("job_id") or ""
        self._gateway.count_unknown(fields.unknown)
        if fields.violations:
            raise TokenwireError("INVALID_REQUEST", fields=fields.violations)
        check_job_id(job_id)
        answer = await self._gateway.pool.cancel(job_id, self._gateway.metadata(scope))
        content = {
            "job_id": job_id,
            "outcome": _CANCEL_OUTCOMES.get(answer.outcome, "unknown"),
            "tokens_out": answer.tokens_out,
        }
        await respond(send, 202, json.dumps(content).encode())


def refuse_resume(scope: Scope) -> None:
    """A new POST would start the generation again and repeat its tokens, so it must not look like a resumption."""
    if header(scope, b"last-event-id"):
        fields = Fields({})
        message = "a POST starts a new generation and cannot resume one"
        fields.refuse("Last-Event-ID", "RESUME_UNSUPPORTED", "absent", message)
        raise TokenwireError("INVALID_REQUEST", message, fields=fields.violations)


def parse_execute(body: dict[str, Any], gateway: Gateway, limits: Limits | None = None) -> pb.ExecuteRequest:
    """Raises TokenwireError: INVALID_REQUEST with every violation."""
    fields = Fields(body)
    job_id = fields.string("job_id") or ""
    prompt = fields.string("prompt")
    ids = fields.any("prompt_tokens")
    if ids is not None and not (isinstance(ids, list) and all(is_integer(item) for item in ids)):
        fields.wrong_type("prompt_tokens", "a list of integers")
        ids = None
    chat = _messages(fields)
    if fields.violations and prompt is None and ids is None and chat is None:
        prompt = "-"  # an input of the wrong type is no missing input
    raw = RawRequest(
        job_id=job_id,
        prompt=prompt,
        prompt_tokens=ids,
        chat=chat,
        logprobs=fields.integer("logprobs"),
        detach=fields.boolean("detach") or False,
        attach_token=fields.string("attach_token"),
        response_format=_response_format(fields),
        **sampling(fields),
    )
    gateway.count_unknown(fields.unknown)
    return checked_request(fields, raw, limits or gateway.limits(), _renamed)


def _renamed(name: str) -> str:
    return name.removeprefix("chat.") if name != "chat" else "messages"


def _response_format(fields: Fields) -> ResponseFormat | None:
    """`{"json_schema": …}`, as an object or as text, or `{"regex": "…"}`."""
    wanted = fields.any("response_format")
    if wanted is None:
        return None
    if not isinstance(wanted, dict):
        fields.wrong_type("response_format", "an object")
        return None
    if len(wanted) != 1 or not wanted.keys() <= set(GRAMMARS):
        return ResponseFormat("", "")  # which the validator refuses
    ((kind, text),) = wanted.items()
    if kind == "json_schema" and isinstance(text, dict | bool):
        text = json.dumps(text)
    if not isinstance(text, str):
        fields.wrong_type(f"response_format.{kind}", "a string")
        return None
    return ResponseFormat(kind, text)


def _messages(fields: Fields) -> list[tuple[str, str]] | None:
    messages = fields.any("messages")
    if messages is None:
        return None
    if not isinstance(messages, list):
        fields.wrong_type("messages", "a list")
        return None
    chat: list[tuple[str, str]] = []
    for place, message in enumerate(messages):
        if not isinstance(message, dict):
            fields.wrong_type(f"messages[{place}]", "an object")
            continue
        pair = (message.get("role"), message.get("content"))
        for name, value in zip(("role", "content"), pair, strict=True):
            if not isinstance(value, str):
                fields.wrong_type(f"messages[{place}].{name}", "a string")
        chat.append((str(pair[0]), str(pair[1])))
    return chat


class ExecuteFrames:
    """Events under their own names. The id of each is the index of the first token that comes after it."""

    def __init__(self, first: int = 0) -> None:
        self._next = first
        self._show_digest = False

    def event(self, event: pb.ExecuteEvent) -> bytes:
        kind = event.WhichOneof("event")
        if kind == "token":
            token = event.token
            self._next = token.i + len(token.ids)
            more = f',"logprobs":{dumps(_logprobs(token))}' if token.logprobs else ""
            if self._show_digest:
                more += f',"digest":"{token.digest}"'
            data = f'{{"t":{quoted(token.t)},"i":{token.i}{more}}}'
        elif kind == "started":
            # Who may resume gets what proves that nothing was lost or changed.
            self._show_digest = bool(event.started.attach_token)
            data = dumps(_started(event.started))
        elif kind == "metrics":
            data = dumps(_metrics(event.metrics))
        elif kind == "end":
            data = dumps(_end(event.end))
        else:
            return b""
        return f"event: {kind}\nid: {self._next}\ndata: {data}\n\n".encode()

    def failure(self, error: TokenwireError) -> bytes:
        data = dumps({"code": error.code, "message": error.message, "retriable": error.retriable})
        return f"event: error\nid: {self._next}\ndata: {data}\n\n".encode()

    def done(self) -> bytes:
        return b""


def _started(started: pb.Started) -> dict[str, Any]:
    detached = {"attach_token": started.attach_token} if started.attach_token else {}
    return {
        "job_id": started.job_id,
        "model": started.model,
        "started_at": started.started_at.ToJsonString(),
        "seed": started.seed,
        "prompt_tokens": started.prompt_tokens,
        "cached_tokens": started.cached_tokens,
        **detached,
    }


def _metrics(metrics: pb.Metrics) -> dict[str, Any]:
    return {field.name: getattr(metrics, field.name) for field in metrics.DESCRIPTOR.fields}


def _end(end: pb.End) -> dict[str, Any]:
    result: dict[str, Any] = {
        "tokens_out": end.tokens_out,
        "decode_time_ms": end.decode_time_ms,
        "stop_reason": _STOP_REASONS.get(end.stop_reason, "UNSPECIFIED"),
    }
    if end.stop_sequence:
        result["stop_sequence_matched"] = end.stop_sequence
    result["digest"] = end.digest
    return result


def _logprobs(token: pb.Token) -> list[dict[str, Any]]:
    return [
        {
            **_logprob(entry),
            "top": [_logprob(top) for top in entry.top],
        }
        for entry in token.logprobs
    ]


def _logprob(entry: pb.TokenLogprob | pb.TopLogprob) -> dict[str, Any]:
    return {"id": entry.id, "t": entry.t, "bytes": list(entry.raw), "logprob": entry.logprob}
