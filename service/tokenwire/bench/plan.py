"""What a measurement sends, and a process's share of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokenwire.bench.load import Record, closed_loop, num_connections, open_loop, poisson_offsets, random_prompt
from tokenwire.bench.worker import OpenClient, WorkerLoad

# Prompts of the warm-up have numbers that no measured request has.
WARM_UP_FROM = 2**32


@dataclass(frozen=True)
class Plan:
    """What to send. `rate` in requests a second makes it an open loop; without it `concurrency` clients wait.

    Attributes:
        connections: of all processes together; at least one each.
        processes: client processes that share the load.
    """

    target: str
    requests: int
    concurrency: int
    rate: float | None
    prompt_tokens: int
    max_tokens: int
    temperature: float
    warm_up: int
    connections: int
    ban_tokens: tuple[int, ...]
    seed: int
    timeout_s: float | None
    processes: int = 1


async def run_share(
    plan: Plan, vocab_size: int, index: int, begin: Callable[[], object], open_client: OpenClient | None = None
) -> list[Record]:
    """Sends every `plan.processes`-th request, from number `index` on.

    Args:
        vocab_size: of the worker's model.
        open_client: makes the clients; default: plain ones of `plan.target`.
        begin: called between the warm-up and the measured requests; may block until the other shares are there too.
    """
    step = plan.processes
    concurrency = _part(plan.concurrency, index, step)
    numbers = range(index, plan.requests, step)

    def prompt(number: int) -> list[int]:
        return random_prompt(number, plan.prompt_tokens, vocab_size, plan.seed)

    load = WorkerLoad(
        open_client or plan.target,
        connections=max(1, _part(plan.connections, index, step)) if plan.connections else num_connections(concurrency),
        prompts=prompt,
        max_tokens=plan.max_tokens,
        temperature=plan.temperature,
        banned_ids=plan.ban_tokens,
        timeout_s=plan.timeout_s,
    )
    async with load:
        warm_up = _part(plan.warm_up, index, step)
        await closed_loop(lambda i: load.send(WARM_UP_FROM + index + i * step), warm_up, concurrency)
        begin()
        if plan.rate is None:
            return await closed_loop(lambda i: load.send(numbers[i]), len(numbers), concurrency)
        offsets_s = poisson_offsets(plan.requests, plan.rate, plan.seed)[index::step]
        return await open_loop(lambda i: load.send(numbers[i]), offsets_s)


def _part(total: int, index: int, count: int) -> int:
    """What `index` of `count` gets of a total that is shared out as evenly as can be."""
    return total // count + (index < total % count)
