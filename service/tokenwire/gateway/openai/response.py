"""A job's events in OpenAI's shapes: whole, or in chunks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenwire.errors import TokenwireError
from tokenwire.gateway.errors import openai_body
from tokenwire.gateway.openai.request import CompletionRequest
from tokenwire.gateway.sse import dumps, quoted
from tokenwire.v1 import inference_pb2 as pb

_FINISH_REASONS: dict[int, str] = {
    pb.STOP_REASON_EOS: "stop",
    pb.STOP_REASON_STOP_SEQUENCE: "stop",
    pb.STOP_REASON_MAX_TOKENS: "length",
}
DONE = b"data: [DONE]\n\n"


class Usage:
    """Counts of one job, gathered from its events."""

    def __init__(self) -> None:
        self.started = pb.Started()
        self.end = pb.End()

    def see(self, event: pb.ExecuteEvent) -> None:
        if event.HasField("started"):
            self.started = event.started
        elif event.HasField("end"):
            self.end = event.end

    @property
    def finish_reason(self) -> str:
        return _FINISH_REASONS.get(self.end.stop_reason, "stop")

    def shape(self) -> dict[str, Any]:
        prompt, completion = self.started.prompt_tokens, self.end.tokens_out
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self.started.cached_tokens},
        }


class Chunks:
    """The frames of a stream. All of a chunk but its text is the same from token to token, and made once."""

    def __init__(self, request: CompletionRequest, correlation_id: str) -> None:
        self._request = request
        self._correlation_id = correlation_id
        self._usage = Usage()
        self._offset = 0
        self._head = ""
        self._tail = ""

    def event(self, event: pb.ExecuteEvent) -> bytes:
        if event.HasField("token"):
            return self._token(event.token)
        self._usage.see(event)
        if event.HasField("started"):
            return self._begin(event.started)
        if event.HasField("end"):
            return self._end()
        return b""

    def failure(self, error: TokenwireError) -> bytes:
        return b"event: error\ndata: " + openai_body(error, self._correlation_id) + b"\n\n"

    def done(self) -> bytes:
        return DONE

    def _begin(self, started: pb.Started) -> bytes:
        kind = "chat.completion.chunk" if self._request.is_chat else "text_completion"
        self._head = f'data: {{"id":{quoted(started.job_id)},"object":"{kind}",'
        self._head += f'"created":{started.started_at.seconds},"model":{quoted(started.model)},"choices":['
        self._tail = '],"usage":null}\n\n' if self._request.include_usage else "]}\n\n"
        if not self._request.is_chat:
            return b""
        return self._choice('"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null')

    def _token(self, token: pb.Token) -> bytes:
        logprobs = "null"
        if token.logprobs:
            shape = chat_logprobs if self._request.is_chat else completion_logprobs
            logprobs = dumps(shape(token.logprobs, self._offset))
        self._offset += len(token.t)
        text = quoted(token.t)
        text = f'"delta":{{"content":{text}}}' if self._request.is_chat else f'"text":{text}'
        return self._choice(f'{text},"logprobs":{logprobs},"finish_reason":null')

    def _end(self) -> bytes:
        text = '"delta":{}' if self._request.is_chat else '"text":""'
        last = self._choice(f'{text},"logprobs":null,"finish_reason":"{self._usage.finish_reason}"')
        if self._request.include_usage:
            last += f'{self._head}],"usage":{dumps(self._usage.shape())}}}\n\n'.encode()
        return last

    def _choice(self, content: str) -> bytes:
        return f'{self._head}{{"index":0,{content}}}{self._tail}'.encode()


def whole(request: CompletionRequest, events: Iterable[pb.ExecuteEvent]) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    usage = Usage()
    texts: list[str] = []
    entries: list[pb.TokenLogprob] = []
    for event in events:
        usage.see(event)
        if event.HasField("token"):
            texts.append(event.token.t)
            entries.extend(event.token.logprobs)
    text = "".join(texts)
    choice: dict[str, Any] = {"index": 0}
    if request.is_chat:
        choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        choice["logprobs"] = chat_logprobs(entries, 0) if request.logprobs else None
    else:
        choice["text"] = text
        choice["logprobs"] = completion_logprobs(entries, 0) if request.logprobs else None
    choice["finish_reason"] = usage.finish_reason
    return {
        "id": usage.started.job_id,
        "object": "chat.completion" if request.is_chat else "text_completion",
        "created": usage.started.started_at.seconds,
        "model": usage.started.model,
        "choices": [choice],
        "usage": usage.shape(),
    }


def chat_logprobs(entries: Iterable[pb.TokenLogprob], offset: int) -> dict[str, Any]:
    content = [{**_logprob(entry), "top_logprobs": [_logprob(top) for top in entry.top]} for entry in entries]
    return {"content": content, "refusal": None}


def _logprob(entry: pb.TokenLogprob | pb.TopLogprob) -> dict[str, Any]:
    return {"token": entry.t, "logprob": entry.logprob, "bytes": list(entry.raw)}


def completion_logprobs(entries: Iterable[pb.TokenLogprob], offset: int) -> dict[str, Any]:
    """`offset` is the number of characters of the answer before the first entry."""
    result: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for entry in entries:
        result["tokens"].append(entry.t)
        result["token_logprobs"].append(entry.logprob)
        result["top_logprobs"].append({top.t: top.logprob for top in entry.top} or None)
        result["text_offset"].append(offset)
        offset += len(entry.t)
    return result
