"""Times the HTTP gateway against gRPC straight to the same worker, in turns.

    python -m benchmarks.gateway MODEL.gguf [--concurrency 16] [--runs 5] [--apart]

The same closed loop as `benchmarks.service`: distinct prompts, greedy, every answer with exactly `--max-tokens` tokens.
The gateway runs in the worker's process; with `--apart`, one in a process of its own is measured too. What counts is
the ratio of tokens per second to gRPC's; a client's own share of the processor is in the table, since a client that is
busy itself slows both.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.llama_server import post_events
from benchmarks.processes import free_port, llama_server_is_ready, running, worker_is_ready
from benchmarks.service import Figures, Load, streamed_run
from tokenwire._native import GgufFile
from tokenwire.bench.load import Answer, Arrival, Send, num_connections
from tokenwire.bench.worker import WorkerLoad
from tokenwire.text import load_text


class GatewayLoad:
    """Sends prompts to `POST /execute`, one connection a request.

    Args:
        port: on 127.0.0.1.
        load: what is sent.
        banned_ids: token ids that may not be generated.
    """

    def __init__(self, port: int, load: Load, banned_ids: Sequence[int]) -> None:
        self._port = port
        self._load = load
        self._logit_bias = {str(token): -100 for token in banned_ids}

    async def send(self, number: int) -> Answer:
        """Sends request `number` and reads its stream to the end. A refusal is an answer; a broken stream raises."""
        body = {
            "job_id": f"bench-{self._port}-{number}",
            "prompt": self._load.prompt(number),
            "max_tokens": self._load.max_tokens,
            "temperature": 0,
            "seed": number,
            "logit_bias": self._logit_bias,
        }
        arrivals: list[Arrival] = []
        prompt_tokens = cached_tokens = next_index = 0
        async for event in post_events(self._port, "/execute", body):
            if "http_status" in event:
                return Answer(error_code=f"HTTP {event['http_status']}")
            if "t" in event:
                # An event with several tokens says so by the index of the next; until then it counts as one.
                if arrivals and event["i"] > next_index:
                    arrivals[-1] = Arrival(arrivals[-1].at_s, arrivals[-1].num_tokens + event["i"] - next_index)
                next_index = event["i"] + 1
                arrivals.append(Arrival(time.perf_counter(), 1))
            elif "started_at" in event:
                prompt_tokens, cached_tokens = event["prompt_tokens"], event["cached_tokens"]
            elif "code" in event:
                return Answer(tuple(arrivals), event["code"])
            elif "stop_reason" in event:
                if arrivals and event["tokens_out"] > next_index:
                    missing = event["tokens_out"] - next_index
                    arrivals[-1] = Arrival(arrivals[-1].at_s, arrivals[-1].num_tokens + missing)
                return Answer(tuple(arrivals), "", event["stop_reason"].lower(), prompt_tokens, cached_tokens)
        raise ConnectionError("the gateway ended a stream without its last event")


async def measure(
    load: Load, target: str, ports: dict[str, int], pids: Sequence[int], banned_ids: Sequence[int], num_runs: int
) -> dict[str, list[Figures]]:
    """Every contestant's runs, taken in turns after one run of each that is not counted."""
    connections = num_connections(load.concurrency)
    direct = WorkerLoad(
        target, connections=connections, prompts=load.prompt, max_tokens=load.max_tokens, banned_ids=banned_ids
    )
    async with direct:
        sends: dict[str, Send] = {"gRPC": direct.send}
        sends |= {name: GatewayLoad(port, load, banned_ids).send for name, port in ports.items()}
        results: dict[str, list[Figures]] = {name: [] for name in sends}
        for run in range(num_runs + 1):
            rates = []
            for place, (name, send) in enumerate(sends.items()):
                # Prompts that nobody has sent before, so that no prefix is cached for one and not for another.
                first_number = (run * len(sends) + place) * load.requests
                row = await streamed_run(send, load, first_number, pids)
                rates.append(f"{name} {row.tokens_per_second:.0f}")
                if run > 0:
                    results[name].append(row)
            print(f"round {run} of {num_runs}, tokens/s: {', '.join(rates)}", file=sys.stderr, flush=True)
    return results


def print_table(load: Load, runs: dict[str, list[Figures]]) -> None:
    print(f"{load.concurrency} clients, {load.requests} requests a run, {load.max_tokens} tokens out, medians")
    print(f"{'':14}{'tokens/s':>9} {'of gRPC':>8} {'TTFT p50':>9} {'ITL p50':>8} {'ITL p99':>8} {'client':>7}")
    base = _median(runs["gRPC"], "tokens_per_second")
    for name, rows in runs.items():
        rate = _median(rows, "tokens_per_second")
        print(
            f"{name:14}{rate:9.1f} {rate / base:8.1%} {_median(rows, 'ttft_p50'):9.1f} {_median(rows, 'itl_p50'):8.2f} "
            f"{_median(rows, 'itl_p99'):8.2f} {_median(rows, 'client_share'):7.2f}"
        )
    disturbed = max(row.others_share for rows in runs.values() for row in rows)
    if disturbed > 0.1:
        print(f"disturbed: other processes used up to {disturbed:.2f} cores in a run")


def _median(rows: Sequence[Figures], field: str) -> float:
    return statistics.median(getattr(row, field) or 0.0 for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--apart", action="store_true", help="also measure a gateway in a process of its own")
    parser.add_argument("--threads", type=int, default=2, help="of the engine")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--requests", type=int, help="in each run; default: three for each client")
    parser.add_argument("--prompt-words", type=int, default=55)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write every run's figures here")
    arguments = parser.parse_args()
    load = Load(
        requests=arguments.requests or 3 * arguments.concurrency,
        concurrency=arguments.concurrency,
        prompt_words=arguments.prompt_words,
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
    )
    text = load_text(GgufFile(str(arguments.model)), arguments.model)
    banned_ids = text.stop_token_ids
    text.close()
    # As an exception, so that the servers end with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    target = f"127.0.0.1:{free_port()}"
    ports = {"HTTP": free_port()}
    with contextlib.ExitStack() as stack:
        command = [sys.executable, "-m", "tokenwire", "serve", "--model", str(arguments.model)]
        command += ["--port", target.rpartition(":")[2], "--http-port", str(ports["HTTP"])]
        command += ["--num-threads", str(arguments.threads), "--log-level", "warning"]
        pids = [stack.enter_context(running(command, lambda: worker_is_ready(target)))]
        if arguments.apart:
            port = ports["HTTP apart"] = free_port()
            command = [sys.executable, "-m", "tokenwire", "gateway", "--target", target, "--http-port", str(port)]
            command += ["--log-level", "warning"]
            pids.append(stack.enter_context(running(command, lambda: llama_server_is_ready(port))))
        runs = asyncio.run(measure(load, target, ports, pids, banned_ids, arguments.runs))
    print_table(load, runs)
    if arguments.json:
        report = {"load": asdict(load), "runs": {name: [asdict(run) for run in rows] for name, rows in runs.items()}}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
