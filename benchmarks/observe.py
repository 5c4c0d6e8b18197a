"""What watching a worker costs: tokens a second while it is scraped against while it is not, and probes under load.

`python -m benchmarks.observe MODEL.gguf` runs both sides in turns on one worker and prints the ratio of medians.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import statistics
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.processes import free_port, running, worker_is_ready
from tokenwire.bench.load import closed_loop, num_connections, random_prompt
from tokenwire.bench.worker import WorkerLoad

PARALLEL_PROBES = 100
PROBE_CONNECTIONS = 4


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64, help="in each run")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=30_000, help="prompts are of ids below this")
    parser.add_argument("--banned", type=int, nargs="*", default=[0, 2], help="the model's end-of-generation ids")
    parser.add_argument("--runs", type=int, default=5, help="of each side")
    parser.add_argument("--scrape-seconds", type=float, default=1.0, help="between two scrapes")
    asyncio.run(measure(parser.parse_args(arguments)))


async def measure(args: argparse.Namespace) -> None:
    port, metrics_port = free_port(), free_port()
    target = f"127.0.0.1:{port}"
    command = [sys.executable, "-m", "tokenwire", "serve", "--model", str(args.model), "--port", str(port)]
    command += ["--metrics-port", str(metrics_port), "--log-level", "error"]
    with running(command, lambda: worker_is_ready(target)):
        rates: dict[bool, list[float]] = {False: [], True: []}
        scrapes_ms: list[float] = []
        await one_run(args, target, 0)  # warms both sides
        for run in range(args.runs):
            for scraped in (False, True):
                scraping = None
                if scraped:
                    scraping = asyncio.ensure_future(scrape(metrics_port, args.scrape_seconds, scrapes_ms))
                rates[scraped].append(await one_run(args, target, 1 + 2 * run + scraped))
                if scraping is not None:
                    scraping.cancel()
                    await asyncio.gather(scraping, return_exceptions=True)
        calm, watched = (statistics.median(rates[side]) for side in (False, True))
        every = f"scraped every {args.scrape_seconds:g} s"
        print(f"tokens/s: {calm:.1f} calm, {watched:.1f} {every}, ratio {watched / calm:.4f}")
        print(f"a scrape takes {statistics.median(scrapes_ms):.1f} ms, at worst {max(scrapes_ms):.1f} ms")

        for spread_s, when in ((0.0, "at once"), (1.0, "once a second each")):
            loading = asyncio.ensure_future(keep_busy(args, target))
            await asyncio.sleep(0.5)
            probes_ms = sorted(await probes(target, spread_s))
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            p50, p99 = (probes_ms[int(share * len(probes_ms))] for share in (0.5, 0.99))
            print(f"{PARALLEL_PROBES} probes {when} under load: p50 {p50:.1f} ms, p99 {p99:.1f} ms, client included")


async def one_run(args: argparse.Namespace, target: str, run: int) -> float:
    """Tokens a second of a closed loop; no two runs share a prompt."""

    def prompt(number: int) -> list[int]:
        return random_prompt(run * args.requests + number, 32, args.vocabulary, seed=7)

    load = WorkerLoad(
        target,
        connections=num_connections(args.concurrency),
        prompts=prompt,
        max_tokens=args.max_tokens,
        banned_ids=args.banned,
    )
    async with load:
        began = time.perf_counter()
        records = await closed_loop(load.send, args.requests, args.concurrency)
        elapsed_s = time.perf_counter() - began
    tokens = sum(record.answer.num_tokens for record in records)
    if tokens != args.requests * args.max_tokens:
        raise SystemExit(f"the run made {tokens} tokens: a request failed or ended early")
    return tokens / elapsed_s


async def keep_busy(args: argparse.Namespace, target: str) -> None:
    """Load until cancelled."""
    for run in itertools.count(10_000):
        await one_run(args, target, run)


async def scrape(port: int, every_s: float, took_ms: list[float]) -> None:
    def once() -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as page:
            page.read()

    while True:
        began = time.perf_counter()
        await asyncio.to_thread(once)
        took_ms.append((time.perf_counter() - began) * 1000)
        await asyncio.sleep(every_s)


async def probes(target: str, spread_s: float) -> list[float]:
    """Milliseconds of each of ten rounds of probes, those of a round sent within `spread_s`."""
    own = (("grpc.use_local_subchannel_pool", 1),)
    async with contextlib.AsyncExitStack() as stack:
        stubs = [
            health_pb2_grpc.HealthStub(await stack.enter_async_context(grpc.aio.insecure_channel(target, options=own)))
            for _ in range(PROBE_CONNECTIONS)
        ]

        async def probe(number: int) -> float:
            await asyncio.sleep(spread_s * number / PARALLEL_PROBES)
            began = time.perf_counter()
            await stubs[number % PROBE_CONNECTIONS].Check(health_pb2.HealthCheckRequest(service="readiness"))
            return (time.perf_counter() - began) * 1000

        await asyncio.gather(*map(probe, range(PARALLEL_PROBES)))
        took_ms: list[float] = []
        for _ in range(10):
            took_ms += await asyncio.gather(*map(probe, range(PARALLEL_PROBES)))
        return took_ms


if __name__ == "__main__":
    main()
