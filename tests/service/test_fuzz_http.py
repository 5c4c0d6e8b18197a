"""Random bytes through the JSON layer, random text through the frames (H29): only typed refusals, and nothing is lost.

8 seconds by default; with `-m slow`, 10 minutes. `FUZZ_SEED` repeats a run.
"""

from __future__ import annotations

import json
import os
import random
import time
from typing import Any

import pytest

from e2e.helpers import only_when_asked, say
from tokenwire.errors import TokenwireError
from tokenwire.gateway import errors
from tokenwire.gateway.body import parse_json_object
from tokenwire.gateway.context import Gateway
from tokenwire.gateway.execute import ExecuteFrames, parse_execute
from tokenwire.gateway.metrics import gateway_registry
from tokenwire.gateway.openai.request import CompletionRequest, parse_chat, parse_completion
from tokenwire.gateway.openai.response import Chunks
from tokenwire.gateway.pool import WorkerPool
from tokenwire.http_config import HttpSettings
from tokenwire.v1 import inference_pb2 as pb

PRIVATE = "correct horse battery"
CHARS = [
    *"\n\r\0\t :{}[]\",\\'a1é\x7f\x85\u2028\u2029\ufeff\ud800\udc00\U0001f600",
    "data: ",
    "event: ",
    "\\u",
    PRIVATE,
]
NAMES = [
    *("job_id", "prompt", "prompt_tokens", "messages", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed"),
    *("stop", "logit_bias", "logprobs", "detach", "attach_token", "response_format", "priority", "cache_salt", "model"),
    *("stream", "stream_options", "top_logprobs", "n", "tools", "max_completion_tokens", "role", "content", "type"),
    *("text", "json_schema", "schema", "regex", "include_usage", "unknown"),
]
ATOMS: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        1.0,
        0.5,
        2**31,
        2**64 - 1,
        2**64,
        -(10**40),
        1e308,
        1e-320,
        "",
        "x",
        "user",
        "text",
    ),
    *("json_schema", "json_object", [], {}, [1], ["x"], [[1]], {"1": 1.0}, {"x": 1}, PRIVATE),
]


class Fuzzer:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def text(self) -> str:
        return "".join(self.random.choices(CHARS, k=self.random.randrange(12)))

    def value(self, depth: int = 0) -> Any:
        kind = self.random.randrange(8 if depth < 4 else 6)
        if kind < 4:
            return self.random.choice(ATOMS)
        if kind < 6:
            return self.text()
        if kind == 6:
            return [self.value(depth + 1) for _ in range(self.random.randrange(4))]
        return {self.random.choice(NAMES): self.value(depth + 1) for _ in range(self.random.randrange(4))}

    def body(self) -> bytes:
        """A JSON object that looks like a request, often with its bytes changed."""
        fields = {name: self.value() for name in self.random.sample(NAMES, self.random.randrange(8))}
        if self.random.random() < 0.5:
            fields |= {"job_id": "j", "prompt": "x", "messages": [{"role": "user", "content": self.text()}]}
        data = bytearray(json.dumps(fields, ensure_ascii=self.random.random() < 0.7).encode("utf-8", "surrogatepass"))
        for _ in range(self.random.choice([0, 0, 1, 2, 8])):
            at = self.random.randrange(len(data) + 1)
            piece = bytes(self.random.choices(b'{}[]",:\\0123456789eE+-.u \xff\xed\xa0\x80\xefNaI', k=3))
            data[at : at + self.random.randrange(4)] = self.random.choice([piece, b"", b"[" * 70, b"9" * 90])
        return bytes(data)


def check_refusal(error: TokenwireError) -> None:
    for body in (errors.body(error, "c"), errors.openai_body(error, "c")):
        assert len(body) < 9000
        assert PRIVATE not in body.decode()
        assert json.loads(body)["error"]["code"]
    assert 400 <= errors.http_status(error) < 500


def check_frames(text: str, others: list[str]) -> None:
    """Text survives frames and their JSON exactly, and no text ends a frame or begins another."""
    started = pb.ExecuteEvent(started=pb.Started(job_id="j", model=text, seed=2**64 - 1))
    tokens = [pb.ExecuteEvent(token=pb.Token(t=part, i=at, ids=[at])) for at, part in enumerate([text, *others])]
    tokens[0].token.logprobs.add(id=1, t=text, raw=text.encode(), logprob=-0.5).top.add(id=2, t=text)
    end = pb.ExecuteEvent(end=pb.End(tokens_out=len(tokens), stop_sequence=text))
    events = [started, *tokens, end]

    frames = ExecuteFrames()
    sent = b"".join(frames.event(event) for event in events) + frames.failure(TokenwireError("INTERNAL", text or "x"))
    parts = sent.decode().split("\n\n")
    assert parts.pop() == ""
    assert len(parts) == len(events) + 1
    data = [json.loads(part.split("\n")[2].removeprefix("data: ")) for part in parts]
    assert all(len(part.splitlines()) == 3 for part in parts)
    assert [part["t"] for part in data[1:-2]] == [text, *others]
    assert data[0]["model"] == text
    assert data[-2].get("stop_sequence_matched", "") == text

    for is_chat in (True, False):
        request = CompletionRequest(pb.ExecuteRequest(), None, is_chat, True, True, True, str)
        chunks = Chunks(request, "c")
        sent = b"".join(chunks.event(event) for event in events) + chunks.done()
        parts = sent.decode().split("\n\n")
        assert parts[-2:] == ["data: [DONE]", ""]
        assert all(len(part.splitlines()) == 1 for part in parts[:-1])
        choices = [choice for part in parts[:-2] for choice in json.loads(part.removeprefix("data: "))["choices"]]
        texts = [choice["delta"].get("content", "") if is_chat else choice["text"] for choice in choices]
        assert "".join(texts) == "".join([text, *others])


def fuzz(seconds: float) -> None:
    seed = int(os.environ.get("FUZZ_SEED", random.SystemRandom().randrange(2**32)))
    fuzzer = Fuzzer(seed)
    pool = WorkerPool(())
    gateway = Gateway(HttpSettings(), pool, gateway_registry(pool))
    give_up_at = time.monotonic() + seconds
    accepted = refused = framed = 0
    while time.monotonic() < give_up_at:
        data = fuzzer.body()
        texts = [fuzzer.text().encode("utf-8", "ignore").decode() for _ in range(3)]
        try:
            for parse in (parse_execute, parse_chat, parse_completion):
                try:
                    parse(parse_json_object(data), gateway)
                    accepted += 1
                except TokenwireError as error:
                    check_refusal(error)
                    refused += 1
            check_frames(texts[0], texts[1:])
            framed += 1
        except BaseException:
            say(f"FUZZ_SEED={seed}; body {data!r}; texts {texts!r}")
            raise
    say(f"seed {seed}: {accepted} bodies accepted, {refused} refused, {framed} streams framed, 0 uncaught")
    assert min(accepted, refused, framed) > 0


def test_nothing_but_typed_refusals_comes_of_random_bodies() -> None:
    fuzz(8)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_but_typed_refusals_comes_of_ten_minutes_of_random_bodies(request: pytest.FixtureRequest) -> None:
    only_when_asked(request)
    fuzz(600)
