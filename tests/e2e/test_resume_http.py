"""Event streams over HTTP that break and are taken up again by `Last-Event-ID`: the same bytes, each once."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from breaking_proxy import BreakingProxy, breaking_proxy
from e2e.helpers import Answer, Request, make_engine, run_alone, say
from e2e.helpers_gate import CONTEXT, make_requests
from e2e.helpers_service import serving
from tokenwire import _native
from tokenwire.config_sources import load_settings
from tokenwire.gateway.pool import WorkerPool
from tokenwire.gateway.server import GatewayServer
from tokenwire.v1 import inference_pb2 as pb
from unit.gguf_builder import tiny_llama

TOKEN = "a-secret-of-the-client"  # noqa: S105
NUM_BROKEN = 40


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "deep.gguf"
    return tiny_llama(path, dtype="Q4_1", context=CONTEXT, n_layers=8, n_embd=256, n_ff=512).path


@dataclass
class Received:
    """What an EventSource would have shown."""

    last_id: str = "0"
    text: str = ""
    num_tokens: int = 0
    kinds: list[str] = field(default_factory=list)
    end: dict[str, Any] = field(default_factory=dict)

    def add(self, event: dict[str, str]) -> None:
        data = json.loads(event["data"])
        if event["event"] == "token":
            assert data["i"] == self.num_tokens
            self.num_tokens = int(event["id"])
            self.text += data["t"]
        elif event["event"] == "end":
            self.end = data
        assert event["event"] != "error", data
        self.last_id = event["id"]
        self.kinds.append(event["event"])


async def events_of(response: httpx.Response) -> AsyncIterator[dict[str, str]]:
    event: dict[str, str] = {}
    async for line in response.aiter_lines():
        if line:
            name, _, value = line.partition(":")
            event[name] = value.removeprefix(" ")
        elif event.get("data"):
            yield event
            event = {}
        else:
            event = {}


def body_of(request: Request, job_id: str) -> dict[str, Any]:
    return {
        "job_id": job_id,
        "prompt_tokens": request.prompt,
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "stop": request.stop,
        "seed": request.seed,
        "detach": True,
        "attach_token": TOKEN,
    }


async def run_broken(proxy: BreakingProxy, request: Request, job_id: str) -> Received:
    """Reads a stream to its end, over as many connections as it takes; a GET for a job that never arrived is a POST."""
    received = Received()
    base = f"http://{proxy.target}/execute"
    posts = True
    async with httpx.AsyncClient(trust_env=False, timeout=20) as http:
        while not received.end:
            headers = {"last-event-id": received.last_id, "x-attach-token": TOKEN}
            try:
                call = (
                    http.stream("POST", base, json=body_of(request, job_id))
                    if posts
                    else http.stream("GET", f"{base}/{job_id}", headers=headers)
                )
                async with call as response:
                    if response.status_code in (404, 409):
                        posts = response.status_code == 404
                        continue
                    assert response.status_code == 200
                    async for event in events_of(response):
                        received.add(event)
            except httpx.TransportError:
                posts = False
    return received


def check(received: Received, expected: Answer) -> None:
    end = pb.End.FromString(expected.end)
    assert received.text == expected.text
    assert received.num_tokens == received.end["tokens_out"] == len(expected.ids)
    assert received.end["digest"] == end.digest
    assert received.kinds.count("end") == 1
    assert received.kinds[0] == "started"


async def test_broken_event_streams_are_resumed_without_a_changed_byte(deep: Path) -> None:
    rng = random.Random(5)
    requests = [
        replace(request, salt=b"", logprobs=-1, max_tokens=rng.choice((request.max_tokens, 100)), logit_bias=())
        for request in make_requests(NUM_BROKEN, seed=4, longest_prompt=300)
    ]
    requests = [replace(request, frequency_penalty=0.0, presence_penalty=0.0) for request in requests]
    quiet = make_engine(_native, deep, num_threads=1, prefix_cache=False)
    expected = [run_alone(quiet, request) for request in requests]
    quiet.stop()
    broken = cuts = 0
    async with serving(deep, num_threads=2) as service:
        gateway = GatewayServer(
            load_settings({"http_port": 0}, environ={}), "127.0.0.1", WorkerPool([f"127.0.0.1:{service.port}"])
        )
        gateway.bind()
        await gateway.start()
        give_up_at = asyncio.get_running_loop().time() + 20
        while not all(worker.ready and worker.limits for worker in gateway.gateway.pool.workers):
            assert asyncio.get_running_loop().time() < give_up_at
            await asyncio.sleep(0.01)

        async def one(number: int) -> int:
            i = number % len(requests)
            num_bytes = 600 + 80 * len(expected[i].ids)
            points = [rng.randint(1, num_bytes) for _ in range(rng.randint(1, 3))]
            async with breaking_proxy(gateway.port, points) as proxy:
                check(await run_broken(proxy, requests[i], f"job-{number}"), expected[i])
                return proxy.num_cut

        for begin in range(0, 20 * NUM_BROKEN, 8):
            results = await asyncio.gather(*(one(number) for number in range(begin, begin + 8)))
            broken += sum(num_cut > 0 for num_cut in results)
            cuts += sum(results)
            if broken >= NUM_BROKEN:
                break
        await gateway.stop(1)
    say(f"{broken} event streams broken by {cuts} cuts and resumed over HTTP, 0 differ")
    assert broken >= NUM_BROKEN
