"""Streams that break and are taken up again, over the real engine: no byte is lost, repeated or changed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from breaking_proxy import breaking_proxy
from e2e.helpers import STOP_TOKEN_IDS, Answer, Request, make_engine, only_when_asked, run_alone, say
from e2e.helpers_gate import CONTEXT, make_requests
from e2e.helpers_server import WorkerProcess, free_port
from e2e.helpers_service import serving
from tokenwire import _native
from tokenwire.client import AsyncClient, Client, End, Event, Generation, Metrics, RetryPolicy, Started, Token
from tokenwire.v1 import inference_pb2 as pb
from unit.gguf_builder import tiny_llama

# Calls of one stream must not share a connection with another's, nor find one that is still open.
OPTIONS = (("grpc.use_local_subchannel_pool", 1),)
NO_END = tuple((token, -100.0) for token in STOP_TOKEN_IDS)
PATIENT = RetryPolicy(attempts=20, first_wait_s=0.01, most_wait_s=0.2)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes long enough for a token that streams break in their middle, too."""
    path = tmp_path_factory.mktemp("model") / "deep.gguf"
    return tiny_llama(path, dtype="Q4_1", context=CONTEXT, n_layers=8, n_embd=256, n_ff=512).path


def parameters(request: Request) -> dict[str, Any]:
    """The request as `AsyncClient.execute` takes it."""
    return {
        "token_ids": request.prompt,
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "frequency_penalty": request.frequency_penalty,
        "presence_penalty": request.presence_penalty,
        "logit_bias": dict(request.logit_bias),
        "stop": request.stop,
        "seed": request.seed,
        "logprobs": request.logprobs if request.logprobs >= 0 else None,
    }


def check_order(events: list[Event]) -> None:
    """One `started`, tokens without a gap or a repeat, one `metrics`, one `end`."""
    assert isinstance(events[0], Started)
    assert isinstance(events[-2], Metrics)
    assert isinstance(events[-1], End)
    index = 0
    for event in events[1:-2]:
        assert isinstance(event, Token)
        assert event.index == index
        index += len(event.ids)
    assert events[-1].tokens_out == index


def same(events: list[Event], expected: Answer) -> bool:
    generation = Generation.from_events(events)
    logprobs = pb.Token(
        logprobs=[
            pb.TokenLogprob(
                id=entry.id,
                t=entry.text,
                raw=entry.raw,
                logprob=entry.logprob,
                top=[pb.TopLogprob(id=top.id, t=top.text, raw=top.raw, logprob=top.logprob) for top in entry.top],
            )
            for entry in generation.logprobs
        ]
    )
    end = pb.End.FromString(expected.end)
    return (
        generation.text == expected.text
        and generation.token_ids == expected.ids
        and logprobs.SerializeToString(deterministic=True) == expected.logprobs
        and generation.end.digest == end.digest
        and generation.end.stop_sequence == end.stop_sequence
        and generation.started.seed == expected.seed
    )


@dataclass
class Broken:
    """A stream's events, how many of its connections were cut, and after how many tokens it went on."""

    events: list[Event] = field(default_factory=list)
    num_cut: int = 0
    resumed_at: list[int] = field(default_factory=list)


async def run_broken(port: int, request: Request, rng: random.Random, num_bytes: int) -> Broken:
    """Runs a request whose connections are cut up to three times."""
    cuts = [rng.randint(0, num_bytes) for _ in range(rng.randint(1, 3))]
    async with (
        breaking_proxy(port, cuts) as proxy,
        AsyncClient(proxy.target, options=OPTIONS, retry=PATIENT) as client,
    ):
        broken = Broken()
        async for event in client.execute(**parameters(request), detach=True):
            if proxy.num_cut > broken.num_cut:
                broken.num_cut = proxy.num_cut
                broken.resumed_at.append(event.index if isinstance(event, Token) else 0)
            broken.events.append(event)
        return broken


async def break_streams(path: Path, num_broken: int) -> None:
    """Runs requests through connections that are cut at random bytes until so many streams were broken."""
    rng = random.Random(num_broken)
    # Long answers and short ones; a salt is no field of the message.
    requests = [
        replace(request, salt=b"", max_tokens=rng.choice((request.max_tokens, 100, 200)))
        for request in make_requests(num_broken, seed=3, longest_prompt=300)
    ]
    quiet = make_engine(_native, path, num_threads=1, prefix_cache=False)
    expected = [run_alone(quiet, request) for request in requests]
    quiet.stop()
    broken = cuts = inside = compared = 0
    async with serving(path, num_threads=2) as service:
        for begin in range(0, 100 * len(requests), 16):
            batch = [i % len(requests) for i in range(begin, begin + 16)]
            # About what such a stream takes on the wire, so that most cuts fall inside of it.
            results = await asyncio.gather(
                *(
                    run_broken(service.port, requests[i], rng, 300 + 30 * len(expected[i].ids) + expected[i].num_bytes)
                    for i in batch
                )
            )
            for i, stream in zip(batch, results, strict=True):
                check_order(stream.events)
                assert same(stream.events, expected[i]), f"request {i} was changed by {stream.num_cut} cuts"
                compared += expected[i].num_bytes
                broken += stream.num_cut > 0
                cuts += stream.num_cut
                inside += any(stream.resumed_at)
            if broken >= num_broken:
                break
    say(
        f"{broken} streams broken by {cuts} cuts, {inside} of them inside the text; {compared} bytes compared, 0 differ"
    )
    assert broken >= num_broken
    assert inside >= num_broken // 4


async def test_broken_streams_are_resumed_without_a_changed_byte(deep: Path) -> None:
    await break_streams(deep, 60)


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_five_hundred_broken_streams_are_resumed(deep: Path, request: pytest.FixtureRequest) -> None:
    only_when_asked(request)
    await break_streams(deep, 500)


# --- The worker itself goes away. ---


def generate(
    target: str, request: Request, on_token: Callable[[int], None] = lambda index: None
) -> tuple[list[Event], int]:
    """The events of a detached request, and the calls it took; `on_token` gets the index after each that came."""
    events: list[Event] = []
    with Client(target, retry=PATIENT) as client, client.execute(**parameters(request), detach=True) as stream:
        for event in stream:
            events.append(event)
            if isinstance(event, Token):
                on_token(stream.next_index)
        return events, stream.num_calls


def test_a_worker_that_is_killed_and_started_again_gives_the_same_stream(deep: Path) -> None:
    """After `kill -9` nothing is left of the job: the same request and seed regenerate it, and the digests agree."""
    port = free_port()
    # Events with many alternatives fill the connection's window: the worker cannot be far ahead of the reader.
    request = Request(
        prompt=tuple(range(40, 60)), max_tokens=600, seed=11, temperature=1.0, logprobs=20, logit_bias=NO_END
    )
    with WorkerProcess(deep, port) as worker:
        unbroken, num_calls = generate(worker.target, request)
        assert num_calls == 1
        kill_at = [3, 150]

        def kill(index: int) -> None:
            if kill_at and index >= kill_at[0]:
                kill_at.pop(0)
                worker.kill_and_start_again()

        events, num_calls = generate(worker.target, request, kill)
    assert kill_at == []
    assert num_calls >= 5, "an Attach that found nothing and an Execute for each kill"
    check_order(events)
    seen, whole = Generation.from_events(events), Generation.from_events(unbroken)
    assert (seen.text, seen.token_ids, seen.logprobs) == (whole.text, whole.token_ids, whole.logprobs)
    assert (seen.end.digest, len(seen.token_ids)) == (whole.end.digest, 600)
    say(f"killed twice within 600 tokens, {num_calls} calls; digest {seen.end.digest[:16]} as unbroken")
