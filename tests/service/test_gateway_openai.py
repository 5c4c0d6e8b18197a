"""The official `openai` client, unchanged, against the gateway (W-52)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from tokenwire.engine.fake import FakeEngine, FakeEngineError, FakeOutcome

MESSAGES: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture
async def client(gateway: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[openai.AsyncOpenAI]:
    monkeypatch.setenv("NO_PROXY", "*")
    base_url = f"http://127.0.0.1:{gateway.port}/v1"
    async with openai.AsyncOpenAI(api_key="unused", base_url=base_url, max_retries=0, timeout=20) as client:
        yield client


@pytest.fixture
def eager(worker: Any) -> FakeEngine:
    worker.fake.eager = True
    fake: FakeEngine = worker.fake
    return fake


async def test_models(client: openai.AsyncOpenAI) -> None:
    models = [model async for model in client.models.list()]
    assert [(model.id, model.owned_by) for model in models] == [("test-model", "tokenwire")]
    assert (await client.models.retrieve("test-model")).id == "test-model"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("another")


async def test_chat(client: openai.AsyncOpenAI, eager: FakeEngine) -> None:
    answer = await client.chat.completions.create(
        model="test-model",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]},
        ],
        max_completion_tokens=50,
        temperature=0.5,
        top_p=0.25,
        seed=7,
        stop="END",
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"5": -1},
        user="somebody",
        n=1,
        extra_body={"top_k": 3, "min_p": 0.125, "repetition_penalty": 1.5, "priority": 1},
    )
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model, answer.created) == ("chat.completion", "test-model", 1_700_000_000)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello world!")
    assert (choice.finish_reason, choice.logprobs) == ("stop", None)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (14, 3, 17)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    spec = eager.jobs[-1].spec
    expected = {
        "max_tokens": 50,
        "temperature": 0.5,
        "top_p": 0.25,
        "seed": 7,
        "stop": [b"END"],
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {5: -1.0},
        "top_k": 3,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "logprobs": -1,
        "job_id": answer.id,
    }
    assert {name: spec[name] for name in expected} == expected


async def test_a_full_length_answer_says_so(client: openai.AsyncOpenAI, eager: FakeEngine) -> None:
    answer = await client.chat.completions.create(model="test-model", messages=MESSAGES, max_tokens=2)
    assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("length", "Hello world")


async def test_chat_stream(client: openai.AsyncOpenAI, worker: Any) -> None:
    stream = await client.chat.completions.create(
        model="test-model", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = aiter(stream)
    first = await anext(chunks)
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    job = await worker.submitted()
    for text in ("Hello", " world", "!"):
        job.step()
        chunk = await asyncio.wait_for(anext(chunks), 20)
        assert (chunk.choices[0].delta.content, chunk.usage, chunk.id) == (text, None, first.id)
    last, usage = [chunk async for chunk in chunks]
    assert last.choices[0].finish_reason == "stop"
    assert (usage.choices, usage.usage is not None and usage.usage.total_tokens) == ([], 8)


async def test_without_the_option_no_usage_is_sent(client: openai.AsyncOpenAI, eager: FakeEngine) -> None:
    stream = await client.chat.completions.create(model="test-model", messages=MESSAGES, stream=True)
    chunks = [chunk async for chunk in stream]
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks)


async def test_completion(client: openai.AsyncOpenAI, eager: FakeEngine) -> None:
    for prompt, ids in (("ab", [97, 98]), (["ab"], [97, 98]), ([3, 4], [3, 4]), ([[3, 4]], [3, 4])):
        answer = await client.completions.create(model="test-model", prompt=prompt)  # type: ignore[arg-type]
        assert (answer.object, answer.choices[0].text) == ("text_completion", "Hello world!")
        spec = eager.jobs[-1].spec
        assert (spec["prompt_ids"], spec["max_tokens"]) == (ids, 16)


async def test_completion_stream(client: openai.AsyncOpenAI, eager: FakeEngine) -> None:
    stream = await client.completions.create(model="test-model", prompt="x", stream=True, max_tokens=9)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello world!"
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_an_error_names_field_and_code(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="test-model", messages=MESSAGES, temperature=9, top_p=0)
    assert (caught.value.param, caught.value.code, caught.value.type) == (
        "temperature",
        "range",
        "invalid_request_error",
    )
    assert caught.value.request_id == caught.value.body["correlation_id"]  # type: ignore[index]
    fields = caught.value.body["details"]["fields"]  # type: ignore[index]
    assert [field["field"] for field in fields] == ["temperature", "top_p"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": []}, "messages"),
        ({"stop": ["x" * 33]}, "stop[0]"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_refused_fields_have_openai_names(client: openai.AsyncOpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(**{"model": "test-model", "messages": MESSAGES, **fields})
    assert caught.value.param == param


LACKING = [
    ("n", 2),
    ("tools", [{"type": "function", "function": {"name": "f"}}]),
    ("tool_choice", "required"),
    ("functions", [{"name": "f"}]),
    ("modalities", ["text", "audio"]),
    ("audio", {"voice": "x", "format": "wav"}),
    ("prediction", {"type": "content", "content": "x"}),
    ("store", True),
    ("reasoning_effort", "high"),
    ("web_search_options", {}),
]


@pytest.mark.parametrize(("name", "value"), LACKING, ids=[name for name, _ in LACKING])
async def test_a_known_field_that_is_lacking_is_named(client: openai.AsyncOpenAI, name: str, value: Any) -> None:
    """H21, R25."""
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="test-model", messages=MESSAGES, **{name: value})
    assert (caught.value.param, caught.value.code) == (name, "unsupported_field")


async def test_completions_lack_some_too(client: openai.AsyncOpenAI) -> None:
    for name, value in (("echo", True), ("best_of", 2), ("suffix", "x"), ("n", 10**9), ("prompt", ["a", "b"])):
        body: dict[str, Any] = {"prompt": "x", name: value}
        with pytest.raises(openai.BadRequestError) as caught:
            await client.completions.create(model="test-model", **body)
        assert (caught.value.param, caught.value.code) == (name, "unsupported_field")


async def test_an_image_is_refused_and_not_fetched(client: openai.AsyncOpenAI) -> None:
    """R33."""
    fetched = asyncio.Event()

    async def on_connection(reader: Any, writer: Any) -> None:
        fetched.set()
        writer.close()

    async with await asyncio.start_server(on_connection, "127.0.0.1", 0) as canary:
        url = f"http://127.0.0.1:{canary.sockets[0].getsockname()[1]}/x.png"
        content: Any = [{"type": "text", "text": url}, {"type": "image_url", "image_url": {"url": url}}]
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="m", messages=[{"role": "user", "content": content}])
    assert (caught.value.param, caught.value.code) == ("messages[0].content[1]", "unsupported_content")
    assert not fetched.is_set()


async def test_an_unknown_model_is_not_found(client: openai.AsyncOpenAI) -> None:
    """R37."""
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert caught.value.code == "model_not_found"


async def test_other_failures_have_their_classes(client: openai.AsyncOpenAI, eager: FakeEngine) -> None:
    with pytest.raises(openai.BadRequestError) as too_long:
        await client.completions.create(model="test-model", prompt="x" * 5000)
    assert too_long.value.code == "context_length_exceeded"
    eager.submit_error = FakeEngineError("OVERLOADED", "the queue is full")
    with pytest.raises(openai.RateLimitError) as full:
        await client.chat.completions.create(model="test-model", messages=MESSAGES)
    assert full.value.response.headers["retry-after"] == "1"
    eager.submit_error = FakeEngineError("INTERNAL", "a path: /models/x")
    with pytest.raises(openai.InternalServerError) as bug:
        await client.chat.completions.create(model="test-model", messages=MESSAGES)
    assert "/models" not in str(bug.value)


async def test_a_failure_in_the_stream_is_raised(client: openai.AsyncOpenAI, worker: Any) -> None:
    """H24."""
    stream = await client.chat.completions.create(model="test-model", messages=MESSAGES, stream=True)
    job = await worker.submitted()
    job.step()
    job.finish(FakeOutcome(error_code="VRAM_OOM", error_message="out of memory"))
    texts = []

    async def read() -> None:
        async for chunk in stream:
            texts.append(chunk.choices[0].delta.content)

    with pytest.raises(openai.APIError, match="out of memory"):
        await read()
    assert texts == ["", "Hello"]


async def test_a_broken_stream_has_no_done(gateway: Any, worker: Any) -> None:
    """H24."""
    body = {"messages": MESSAGES, "stream": True}
    async with gateway.http.stream("POST", "/v1/chat/completions", json=body) as response:
        job = await worker.submitted()
        job.finish(FakeOutcome(error_code="VRAM_OOM", error_message="out of memory"))
        text = (await response.aread()).decode()
    assert "[DONE]" not in text
    assert text.rstrip().split("\n\n")[-1].startswith('event: error\ndata: {"error": {')


async def test_leaving_cancels_streamed_or_not(client: openai.AsyncOpenAI, worker: Any) -> None:
    """H25."""
    stream = await client.chat.completions.create(model="test-model", messages=MESSAGES, stream=True)
    job = await worker.submitted()
    await stream.close()
    assert await asyncio.to_thread(job.cancelled.wait, 20)
    asking = asyncio.ensure_future(client.chat.completions.create(model="test-model", messages=MESSAGES))
    job = await worker.submitted()
    asking.cancel()
    assert await asyncio.to_thread(job.cancelled.wait, 20)


async def test_stream_must_be_a_boolean(gateway: Any) -> None:
    """H22."""
    response = await gateway.http.post("/v1/chat/completions", json={"messages": MESSAGES, "stream": "yes"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "stream")


async def test_unknown_fields_are_ignored_and_counted(gateway: Any, eager: FakeEngine) -> None:
    """H21."""
    body = {"messages": MESSAGES, "colour": "green", "top_k": 2, "metadata": {"a": "b"}, "model": "test-model"}
    assert (await gateway.http.post("/v1/chat/completions", json=body)).status_code == 200
    assert gateway.server.gateway.num_unknown_fields == 1


async def test_null_is_unset(gateway: Any, eager: FakeEngine) -> None:
    names = ("model", "temperature", "n", "tools", "stop", "stream", "seed", "logprobs", "user", "response_format")
    body = {"messages": MESSAGES, **dict.fromkeys(names)}
    response = await gateway.http.post("/v1/chat/completions", content=json.dumps(body), headers=JSON)
    assert response.status_code == 200, response.text


JSON = {"content-type": "application/json"}
