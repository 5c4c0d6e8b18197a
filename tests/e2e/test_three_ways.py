"""The same request over gRPC, over REST and through OpenAI's API gives the same text (W-50, W-52)."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from e2e.helpers_server import running_worker
from tokenwire import models
from tokenwire.client import AsyncClient, Message

NUM_REQUESTS = 200
CONCURRENCY = 16
WORDS = Path(__file__).parent.parent.joinpath("golden", "texts", "01_prose_harbour.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def worker() -> Iterator[tuple[str, int]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        http_port = probe.getsockname()[1]
    with running_worker(models.resolve("smollm2", fetch=True), "--http-port", str(http_port)) as target:
        yield target, http_port


def request_of(number: int) -> dict[str, Any]:
    """Chats and texts, greedy and sampled, short; every request differs from every other."""
    words = WORDS.split()
    text = f"{number} " + " ".join(words[(7 * number + place) % len(words)] for place in range(4 + number % 9))
    given: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if number % 2 else {"prompt": text}
    sampling: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.3, "seed": 2**63 + number},
        {"temperature": 0.8, "seed": number, "top_p": 0.9, "frequency_penalty": 0.5, "stop": ["the", "\n"]},
        {"temperature": 1, "seed": number, "logit_bias": {str(number): 5}, "presence_penalty": -1},
        {"temperature": 0.7, "seed": number, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1},
    ]
    return {**given, **sampling[number % 5], "max_tokens": 4 + number % 5}


async def over_grpc(client: AsyncClient, request: dict[str, Any]) -> str:
    params = {name: value for name, value in request.items() if name not in ("prompt", "messages")}
    if "logit_bias" in params:
        params["logit_bias"] = {int(token): bias for token, bias in params["logit_bias"].items()}
    messages = [Message(**message) for message in request["messages"]] if "messages" in request else None
    return (await client.generate(request.get("prompt"), messages=messages, **params)).text


async def over_rest(client: httpx.AsyncClient, request: dict[str, Any], number: int) -> str:
    response = await client.post("/execute", json={"job_id": f"rest-{number}", **request})
    assert response.status_code == 200, response.text
    frames = [dict(line.split(": ", 1) for line in frame.split("\n")) for frame in response.text.strip().split("\n\n")]
    assert frames[-1]["event"] == "end"
    return "".join(json.loads(frame["data"])["t"] for frame in frames if frame["event"] == "token")


async def over_openai(client: openai.AsyncOpenAI, request: dict[str, Any], *, stream: bool) -> str:
    ours = {"top_k", "min_p", "repetition_penalty"}
    body: dict[str, Any] = {name: value for name, value in request.items() if name not in ours}
    extra = {name: value for name, value in request.items() if name in ours}
    model = (await client.models.list()).data[0].id
    if "messages" in body:
        chat: Any = await client.chat.completions.create(model=model, stream=stream, extra_body=extra, **body)
        if not stream:
            return str(chat.choices[0].message.content)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chat])
    completion: Any = await client.completions.create(model=model, stream=stream, extra_body=extra, **body)
    if not stream:
        return str(completion.choices[0].text)
    return "".join([chunk.choices[0].text async for chunk in completion])


@pytest.mark.timeout(300)
async def test_three_ways_to_the_same_text(worker: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    target, http_port = worker
    base = f"http://127.0.0.1:{http_port}"
    turns = asyncio.Semaphore(CONCURRENCY)
    async with (
        AsyncClient(target) as grpc_client,
        httpx.AsyncClient(base_url=base, timeout=60, trust_env=False) as rest,
        openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="unused", max_retries=0) as sdk,
    ):

        async def ask(number: int) -> tuple[str, str, str]:
            request = request_of(number)
            async with turns:
                return await asyncio.gather(
                    over_grpc(grpc_client, request),
                    over_rest(rest, request, number),
                    over_openai(sdk, request, stream=number % 3 == 0),
                )

        answers = await asyncio.gather(*(ask(number) for number in range(NUM_REQUESTS)))
    different = [(number, texts) for number, texts in enumerate(answers) if len(set(texts)) != 1]
    assert different == []
    assert len({texts[0] for texts in answers}) > NUM_REQUESTS // 2
