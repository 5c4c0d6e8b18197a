"""The unmodified OpenAI SDK against a real model: log-probabilities, answers of a form, errors (W-52)."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from e2e.helpers_server import running_worker
from tokenwire import models
from tokenwire.client import Client, Message

QUESTION: list[Any] = [{"role": "user", "content": "Name a city in France and its population."}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "population": {"type": "integer", "minimum": 1}},
    "required": ["city", "population"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def worker() -> Iterator[tuple[str, int]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        http_port = probe.getsockname()[1]
    with running_worker(models.resolve("smollm2", fetch=True), "--http-port", str(http_port)) as target:
        yield target, http_port


@pytest.fixture
def sdk(worker: tuple[str, int]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{worker[1]}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def model(sdk: openai.OpenAI) -> str:
    return sdk.models.list().data[0].id


def test_chat_logprobs_are_those_of_grpc(sdk: openai.OpenAI, model: str, worker: tuple[str, int]) -> None:
    ask: dict[str, Any] = {"messages": QUESTION, "max_tokens": 12, "temperature": 0}
    whole = sdk.chat.completions.create(model=model, logprobs=True, top_logprobs=3, **ask)
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 12 == (whole.usage.completion_tokens if whole.usage else None)
    text = b"".join(bytes(entry.bytes or ()) for entry in logprobs.content).decode()
    assert text == whole.choices[0].message.content
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3
        # Greedy: the token is the most probable one.
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == entry.logprob
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1.0001
    streamed = [
        entry
        for chunk in sdk.chat.completions.create(model=model, logprobs=True, top_logprobs=3, stream=True, **ask)
        for choice in chunk.choices
        if choice.logprobs is not None
        for entry in choice.logprobs.content or ()
    ]
    assert [entry.model_dump() for entry in streamed] == [entry.model_dump() for entry in logprobs.content]
    with Client(worker[0]) as client:
        direct = client.generate(
            messages=[Message(role="user", content=QUESTION[0]["content"])], max_tokens=12, temperature=0, logprobs=3
        )
    assert [entry.logprob for entry in direct.logprobs] == [entry.logprob for entry in logprobs.content]


def test_completion_logprobs(sdk: openai.OpenAI, model: str) -> None:
    answer = sdk.completions.create(
        model=model, prompt="The capital of France is", max_tokens=5, temperature=0, logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or ()) == answer.choices[0].text
    assert logprobs.token_logprobs is not None
    assert len(logprobs.token_logprobs) == 5
    assert all(value <= 0 for value in logprobs.token_logprobs)
    assert logprobs.top_logprobs is not None
    assert all(1 <= len(top) <= 3 for top in logprobs.top_logprobs)


def test_a_json_schema_bounds_the_answer(sdk: openai.OpenAI, model: str) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    answers = set()
    for seed in range(4):
        ask: dict[str, Any] = {"messages": QUESTION, "max_tokens": 60, "temperature": 1.2, "seed": seed}
        whole = sdk.chat.completions.create(model=model, response_format=form, **ask)
        assert whole.choices[0].finish_reason == "stop"
        content = str(whole.choices[0].message.content)
        given = json.loads(content)
        assert set(given) == {"city", "population"}
        assert isinstance(given["city"], str)
        assert len(given["city"]) <= 20
        assert isinstance(given["population"], int)
        assert given["population"] >= 1
        answers.add(content)
        stream = sdk.chat.completions.create(model=model, response_format=form, stream=True, **ask)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == content
    assert len(answers) > 1


def test_a_schema_that_cannot_be_had_is_named(sdk: openai.OpenAI, model: str) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "none", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.chat.completions.create(model=model, messages=QUESTION, max_tokens=4, response_format=form)
    assert "response_format" in str(caught.value.param)
