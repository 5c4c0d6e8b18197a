"""What watching a worker costs: tokens a second while it is scraped against while it is not, and health under load.

`python -m benchmarks.observe MODEL.gguf` runs both sides in turns on one worker and prints the ratio of medians; then
health checks beside as many streams, of the main port and of the health port, from a process of its own: one at a time,
and many at once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import uvloop

from benchmarks.processes import free_port, running, worker_is_ready
from tokenwire.bench.load import closed_loop, num_connections, random_prompt
from tokenwire.bench.worker import WorkerLoad

PARALLEL_PROBES = 100
PROBE_CONNECTIONS = 4
# From the start of the load to the first check, seconds: the streams are under way by then.
LEAD_S = 1.0
_LOADS = itertools.count(1000)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64, help="in each run")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=30_000, help="prompts are of ids below this")
    parser.add_argument("--banned", type=int, nargs="*", default=[0, 2], help="the model's end-of-generation ids")
    parser.add_argument("--runs", type=int, default=5, help="of each side; 0: the health checks alone")
    parser.add_argument("--scrape-seconds", type=float, default=1.0, help="between two scrapes")
    parser.add_argument("--checks", type=int, default=1000, help="of health, by each way to probe")
    # As the worker does: the load shares the processors with what it measures.
    uvloop.run(measure(parser.parse_args(arguments)))


async def measure(args: argparse.Namespace) -> None:
    port, metrics_port, health_port = free_port(), free_port(), free_port()
    target = f"127.0.0.1:{port}"
    command = [sys.executable, "-m", "tokenwire", "serve", "--model", str(args.model), "--port", str(port)]
    command += ["--metrics-port", str(metrics_port), "--health-port", str(health_port), "--log-level", "error"]
    with running(command, lambda: worker_is_ready(target)):
        rates: dict[bool, list[float]] = {False: [], True: []}
        scrapes_ms: list[float] = []
        await one_run(args, target, 0)  # warms both sides
        for run in range(args.runs):
            for scraped in (False, True):
                over = asyncio.Event()
                scraping = scrape(metrics_port, args.scrape_seconds, scrapes_ms, over) if scraped else asyncio.sleep(0)
                watching = asyncio.ensure_future(scraping)
                rates[scraped].append(await one_run(args, target, 1 + 2 * run + scraped))
                over.set()
                await watching
        if args.runs:
            calm, watched = (statistics.median(rates[side]) for side in (False, True))
            every = f"scraped every {args.scrape_seconds:g} s"
            print(f"tokens/s: {calm:.1f} calm, {watched:.1f} {every}, ratio {watched / calm:.4f}")
            print(
                f"a scrape takes {statistics.median(scrapes_ms):.1f} ms, at worst {max(scrapes_ms):.1f} ms", flush=True
            )

        print(f"Health checks beside {args.concurrency} streams, from a process of its own:")
        one_by_one = ("--rounds", str(args.checks), "--interval-ms", "20")
        at_once = ("--rounds", str(args.checks // 5), "--interval-ms", "100", "--parallel", str(PARALLEL_PROBES))
        at_once += ("--connections", str(PROBE_CONNECTIONS))
        for purpose, address in (("main", target), ("health", f"127.0.0.1:{health_port}")):
            await probes(args, purpose, target, address, *one_by_one)
            await probes(args, purpose, target, address, *one_by_one, "--grpcio")
            await probes(args, purpose, target, address, *at_once)


async def one_run(args: argparse.Namespace, target: str, run: int, requests: int | None = None) -> float:
    """Tokens a second of a closed loop; no two runs share a prompt.

    Args:
        requests: how many, if not as many as in each run.
    """
    requests = requests or args.requests

    def prompt(number: int) -> list[int]:
        return random_prompt(run * 10_000 + number, 32, args.vocabulary, seed=7)

    load = WorkerLoad(
        target,
        connections=num_connections(args.concurrency),
        prompts=prompt,
        max_tokens=args.max_tokens,
        banned_ids=args.banned,
    )
    async with load:
        began = time.perf_counter()
        records = await closed_loop(load.send, requests, args.concurrency)
        elapsed_s = time.perf_counter() - began
    tokens = sum(record.answer.num_tokens for record in records)
    if tokens != requests * args.max_tokens:
        raise SystemExit(f"the run made {tokens} tokens: a request failed or ended early")
    return tokens / elapsed_s


async def scrape(port: int, every_s: float, took_ms: list[float], over: asyncio.Event) -> None:
    """Scrapes at once and then in turns; the last one ends before this does."""

    def once() -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as page:
            page.read()

    while not over.is_set():
        began = time.perf_counter()
        await asyncio.to_thread(once)
        took_ms.append((time.perf_counter() - began) * 1000)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(over.wait(), every_s)


async def probes(args: argparse.Namespace, purpose: str, target: str, address: str, *options: str) -> None:
    """Probes a port from a process of its own while the load runs at `target`, and prints the percentiles."""
    loading = asyncio.ensure_future(one_run(args, target, next(_LOADS), requests=10**6))  # until it is cancelled
    await asyncio.sleep(LEAD_S)
    command = [sys.executable, "-m", "benchmarks.probe", address, *options]
    prober = await asyncio.to_thread(subprocess.run, command, stdout=subprocess.PIPE)
    if loading.done():
        loading.result()
    loading.cancel()
    await asyncio.gather(loading, return_exceptions=True)
    if prober.returncode != 0:
        raise SystemExit("the prober failed")
    took_ms = sorted(json.loads(prober.stdout))
    p50, p99 = (took_ms[int(share * len(took_ms))] for share in (0.5, 0.99))
    what = f"{len(took_ms)} checks of the {purpose} port ({' '.join(options)})"
    print(f"{what}: p50 {p50:.2f} ms, p99 {p99:.2f} ms, max {took_ms[-1]:.2f} ms", flush=True)


if __name__ == "__main__":
    main()
