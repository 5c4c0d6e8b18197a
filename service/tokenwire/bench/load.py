"""When requests are sent: a closed loop of clients that wait for their answers, or arrivals that wait for nobody."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

_T = TypeVar("_T")

# A connection's share of the streams; a worker allows 100 on one.
STREAMS_PER_CONNECTION = 50


@dataclass(frozen=True)
class Arrival:
    """An event that carried tokens.

    Attributes:
        at_s: when the client had it, by `time.perf_counter`.
        num_tokens: at least one.
    """

    at_s: float
    num_tokens: int


@dataclass(frozen=True)
class Answer:
    """What one request met.

    Attributes:
        arrivals: in order of time; of a failed request, those before the failure.
        error_code: why it failed; empty for a completed one.
        stop_reason: why a completed one ended.
        prompt_tokens, cached_tokens: as the server counts them.
        queue_ms: how long the server says it waited; None if the server does not say.
    """

    arrivals: tuple[Arrival, ...] = ()
    error_code: str = ""
    stop_reason: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    queue_ms: float | None = None

    @property
    def num_tokens(self) -> int:
        return sum(arrival.num_tokens for arrival in self.arrivals)


@dataclass(frozen=True)
class Record:
    """A request with its times, seconds by `time.perf_counter`.

    Attributes:
        due_s: when it was to be sent. Waiting times count from here, so that a client or a connection that falls
            behind makes them longer, never invisible.
        sent_s: when its sending began.
        ended_s: when its stream had ended.
    """

    due_s: float
    sent_s: float
    ended_s: float
    answer: Answer


# Sends the request of this number and reads its answer to the end. A failure of the request is an answer, not an error.
Send = Callable[[int], Awaitable[Answer]]


async def closed_loop(send: Send, num_requests: int, concurrency: int) -> list[Record]:
    """Sends requests 0 … num_requests−1 so that `concurrency` are under way until none are left to send."""
    numbers = iter(range(num_requests))
    records: list[Record] = []

    async def client() -> None:
        for number in numbers:
            records.append(await _timed(send, number, time.perf_counter()))

    await _all([client() for _ in range(min(concurrency, num_requests))])
    return records


async def open_loop(send: Send, offsets_s: Sequence[float]) -> list[Record]:
    """Sends request i `offsets_s[i]` seconds after the start, however many are still under way."""
    begin_s = time.perf_counter()

    async def arrive(number: int, offset_s: float) -> Record:
        due_s = begin_s + offset_s
        await asyncio.sleep(due_s - time.perf_counter())
        return await _timed(send, number, due_s)

    return await _all([arrive(number, offset_s) for number, offset_s in enumerate(offsets_s)])


def poisson_offsets(num_requests: int, requests_per_s: float, seed: int) -> list[float]:
    """Arrival times of a Poisson process, seconds from its start: independent exponential gaps, the same for a seed."""
    source = random.Random(seed)  # noqa: S311 - arrivals are not a secret
    at_s = 0.0
    offsets_s = []
    for _ in range(num_requests):
        at_s += source.expovariate(requests_per_s)
        offsets_s.append(at_s)
    return offsets_s


def random_prompt(number: int, num_tokens: int, vocab_size: int, seed: int) -> list[int]:
    """Token ids of prompt `number`: the same for a seed, different for every number, so that no prefix is cached.

    The lowest ids are left out where the vocabulary is large: special tokens and single bytes stand there.
    """
    source = random.Random(f"{seed}/{number}")  # noqa: S311 - prompts are not a secret
    first = 1000 if vocab_size > 2000 else 0
    return [source.randrange(first, vocab_size) for _ in range(num_tokens)]


def num_connections(num_streams: int) -> int:
    """How many connections carry this many concurrent streams."""
    return max(1, -(-num_streams // STREAMS_PER_CONNECTION))


async def _timed(send: Send, number: int, due_s: float) -> Record:
    sent_s = time.perf_counter()
    answer = await send(number)
    return Record(due_s=due_s, sent_s=sent_s, ended_s=time.perf_counter(), answer=answer)


async def _all(coroutines: Sequence[Awaitable[_T]]) -> list[_T]:
    """Their results in order; the first to fail cancels the rest."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
