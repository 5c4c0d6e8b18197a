"""Times the service end to end: tokenwire over gRPC, in turns with its engine alone and with llama-server over HTTP.

    python -m benchmarks.service MODEL.gguf [--llama-server PATH [--peer-model PATH]] [--concurrency 16] [--runs 5]

A closed loop of clients sends distinct prompts of random words, greedy; every answer has exactly `--max-tokens` tokens:
end-of-generation tokens are banned, by `logit_bias` here and by `ignore_eos` there. A run that counts another number of
tokens is an error. Server and client share the machine, as in any such measurement on one machine, so the client makes
its frames by hand: gRPC's own would take as much of the processors as the service does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import select
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.llama_server import LlamaServerLoad
from benchmarks.processes import ProcessorTimes, free_port, llama_server_is_ready, running, worker_is_ready
from benchmarks.wire_load import WireLoad
from tokenwire import _native
from tokenwire.bench.load import Send, closed_loop, num_connections
from tokenwire.bench.summary import Summary
from tokenwire.config_sources import load_settings
from tokenwire.engine.load import LoadedModel, load_model

STALL_TIMEOUT_S = 120.0
WORDS = """
river stone morning window paper garden silver market engine winter number letter island bridge music yellow
doctor kitchen summer travel animal butter circle danger energy family ground history iron journey king language
machine nature ocean people quiet road school table under valley water year color dinner evening finger glass
hand image just light money night order place question round small think voice world young clear early figure
green heavy inside large middle north open plain rich sound tree wide above below carry drive enter follow
"""


@dataclass(frozen=True)
class Load:
    """What every run sends; `seed` makes all prompts of all runs distinct."""

    requests: int
    concurrency: int
    prompt_words: int
    max_tokens: int
    seed: int

    def prompt(self, number: int) -> str:
        source = random.Random(f"{self.seed}/{number}")
        words = WORDS.split()
        return " ".join(source.choice(words) for _ in range(self.prompt_words))


@dataclass(frozen=True)
class Figures:
    """One run of one contestant; latencies in milliseconds, None where the contestant has no stream."""

    tokens_per_second: float
    prompt_tokens: float
    ttft_p50: float
    ttft_p95: float | None
    itl_p50: float | None
    itl_p95: float | None
    itl_p99: float | None
    client_share: float
    """Processor time of the client, in cores."""
    others_share: float
    """Processor time that neither the client nor any contestant used, in cores: what disturbed the run."""


def figures(summary: Summary, load: Load, spent: ProcessorTimes) -> Figures:
    """Raises RuntimeError for a run that did not do the work."""
    if summary.ttft_ms is None or summary.errors or summary.tokens_out != load.requests * load.max_tokens:
        counted = f"{summary.tokens_out} tokens of {load.requests * load.max_tokens}"
        raise RuntimeError(f"a run counted {counted}; failed requests: {dict(summary.errors)}")
    itl = summary.itl_ms
    return Figures(
        tokens_per_second=summary.tokens_per_second,
        prompt_tokens=summary.prompt_tokens / summary.completed,
        ttft_p50=summary.ttft_ms.p50,
        ttft_p95=summary.ttft_ms.p95,
        itl_p50=itl.p50 if itl else None,
        itl_p95=itl.p95 if itl else None,
        itl_p99=itl.p99 if itl else None,
        client_share=spent.client_s / summary.duration_s,
        others_share=spent.others_s / summary.duration_s,
    )


async def streamed_run(send: Send, load: Load, first_number: int, pids: Sequence[int]) -> Figures:
    """The closed loop over the network. `pids` are the contestants' processes."""
    before = ProcessorTimes.now(pids)
    records = await closed_loop(lambda number: send(first_number + number), load.requests, load.concurrency)
    return figures(Summary.of(records), load, ProcessorTimes.now(pids) - before)


def engine_run(model: LoadedModel, load: Load, first_number: int, pids: Sequence[int]) -> Figures:
    """The same closed loop straight on the engine: no service, no network, no event is read."""
    engine = model.native
    prompts = [model.text.encode_prompt(load.prompt(first_number + number)) for number in range(load.requests)]
    banned = dict.fromkeys(model.text.stop_token_ids, -100.0)
    waiting: dict[int, Any] = {}
    numbers = iter(range(load.requests))
    first_ms: list[float] = []
    tokens_out = 0

    def submit_next() -> None:
        for number in numbers:
            job = engine.submit(
                job_id=f"bench-{number}",
                model="bench",
                prompt_ids=prompts[number],
                max_tokens=load.max_tokens,
                temperature=0.0,
                top_p=1.0,
                top_k=0,
                min_p=0.0,
                repetition_penalty=1.0,
                frequency_penalty=0.0,
                presence_penalty=0.0,
                logit_bias=banned,
                logprobs=-1,
                stop=[],
                seed=number,
                timeout_ms=0,
                cache_salt=b"",
            )
            waiting[job.handle] = job
            return

    begin_s = time.perf_counter()
    begin_cpu_s = time.thread_time()
    before = ProcessorTimes.now(pids)
    for _ in range(load.concurrency):
        submit_next()
    while waiting:
        if not select.select([engine.event_fd], [], [], STALL_TIMEOUT_S)[0]:
            raise RuntimeError(f"the engine showed no progress for {STALL_TIMEOUT_S:.0f} s")
        for handle in engine.take_ready():
            outcome = waiting[handle].take()[1]
            if outcome is None:
                continue
            if outcome.error_code:
                raise RuntimeError(f"{outcome.error_code} from the engine")
            del waiting[handle]
            tokens_out += outcome.tokens_out
            first_ms.append(outcome.first_token_ms)
            submit_next()
    duration_s = time.perf_counter() - begin_s
    if tokens_out != load.requests * load.max_tokens:
        raise RuntimeError(f"the engine generated {tokens_out} tokens of {load.requests * load.max_tokens}")
    return Figures(
        tokens_per_second=tokens_out / duration_s,
        prompt_tokens=statistics.fmean(len(prompt) for prompt in prompts),
        ttft_p50=statistics.median(first_ms),
        ttft_p95=None,
        itl_p50=None,
        itl_p95=None,
        itl_p99=None,
        client_share=(time.thread_time() - begin_cpu_s) / duration_s,
        others_share=(ProcessorTimes.now(pids) - before).others_s / duration_s,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's server, to run in turns with")
    parser.add_argument("--peer-model", type=Path, help="the peer's file, if not the same")
    parser.add_argument("--threads", type=int, default=2, help="of each engine")
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
    model = load_model(
        load_settings({"model": str(arguments.model), "num_threads": arguments.threads}), lambda percent: None
    )
    # As an exception, so that the servers end with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    worker_port, peer_port = free_port(), free_port()
    target = f"127.0.0.1:{worker_port}"
    with contextlib.ExitStack() as stack:
        stack.callback(model.text.close)
        stack.callback(model.native.stop)
        command = [sys.executable, "-m", "tokenwire", "serve", "--model", str(arguments.model), "--port"]
        command += [str(worker_port), "--num-threads", str(arguments.threads), "--log-level", "warning"]
        pids = [stack.enter_context(running(command, lambda: worker_is_ready(target)))]
        if arguments.llama_server:
            command = [str(arguments.llama_server), "-m", str(arguments.peer_model or arguments.model)]
            slot_tokens = max(512, 4 * load.prompt_words + load.max_tokens)
            command += ["-np", str(load.concurrency), "-c", str(slot_tokens * load.concurrency)]
            command += ["-t", str(arguments.threads)]
            command += ["--host", "127.0.0.1", "--port", str(peer_port)]
            pids.append(stack.enter_context(running(command, lambda: llama_server_is_ready(peer_port))))
        served_port = peer_port if arguments.llama_server else None
        # The client shares the processors with what it measures: it must not be the slow part.
        runs = uvloop.run(measure(model, load, target, served_port, pids, arguments.runs))
    print_table(load, model, runs, arguments)
    if arguments.json:
        report = {"load": asdict(load), "runs": {name: [asdict(run) for run in rows] for name, rows in runs.items()}}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


async def measure(
    model: LoadedModel, load: Load, target: str, peer_port: int | None, pids: Sequence[int], num_runs: int
) -> dict[str, list[Figures]]:
    """Every contestant's runs, taken in turns after one run of each that is not counted."""
    results: dict[str, list[Figures]] = {"engine alone": [], "tokenwire": []}
    worker = WireLoad(
        target,
        connections=num_connections(load.concurrency),
        prompts=load.prompt,
        max_tokens=load.max_tokens,
        banned_ids=model.text.stop_token_ids,
    )
    async with worker:
        sends: dict[str, Send] = {"tokenwire": worker.send}
        if peer_port is not None:
            sends["llama-server"] = LlamaServerLoad(peer_port, load.prompt, load.max_tokens).send
            results["llama-server"] = []
        for run in range(num_runs + 1):
            first_number = run * load.requests
            # Nobody streams while the engine runs alone, so the loop may stand still for it.
            rows = {"engine alone": engine_run(model, load, first_number, pids)}
            for name, send in sends.items():
                rows[name] = await streamed_run(send, load, first_number, pids)
            rates = ", ".join(f"{name} {row.tokens_per_second:.0f}" for name, row in rows.items())
            print(f"round {run} of {num_runs}, tokens/s: {rates}", file=sys.stderr, flush=True)
            if run > 0:
                for name, row in rows.items():
                    results[name].append(row)
    return results


def print_table(load: Load, model: LoadedModel, runs: dict[str, list[Figures]], arguments: argparse.Namespace) -> None:
    print(
        f"{arguments.model.name}, {arguments.threads} threads, {_native.cpu_isa()}: {load.concurrency} clients, "
        f"{load.requests} requests a run, {load.max_tokens} tokens out, medians of {arguments.runs} runs"
    )
    print(
        f"{'':14}{'tokens/s':>9} {'(range)':>14} {'TTFT p50':>9} {'p95':>8} {'ITL p50':>9} {'p95':>8} {'p99':>8}"
        f" {'prompt':>7} {'client':>7} {'others':>7}"
    )
    for name, rows in runs.items():
        rates = [row.tokens_per_second for row in rows]
        cells = [
            f"{statistics.median(rates):9.1f}",
            f"{f'{min(rates):.0f}–{max(rates):.0f}':>14}",
            f"{_median(rows, 'ttft_p50', 1):>9}",
            *(f"{_median(rows, field, digits):>{width}}" for field, digits, width in COLUMNS),
        ]
        print(f"{name:14}" + " ".join(cells))
    disturbed = max(row.others_share for rows in runs.values() for row in rows)
    if disturbed > 0.1:
        print(f"disturbed: other processes used up to {disturbed:.2f} cores in a run")
    ours, engine = runs["tokenwire"], runs["engine alone"]
    print(f"the service's share of the engine's rate: {_ratio(ours, engine, 'tokens_per_second'):.1%}")
    if "llama-server" in runs:
        peer = runs["llama-server"]
        print(
            f"to llama-server: tokens/s × {_ratio(ours, peer, 'tokens_per_second'):.2f}, "
            f"TTFT p50 × {_ratio(ours, peer, 'ttft_p50'):.3f}"
        )


# Field, digits, width, after the rates and the first TTFT column.
COLUMNS = (
    ("ttft_p95", 1, 8),
    ("itl_p50", 2, 9),
    ("itl_p95", 2, 8),
    ("itl_p99", 2, 8),
    ("prompt_tokens", 1, 7),
    ("client_share", 2, 7),
    ("others_share", 2, 7),
)


def _values(rows: Sequence[Figures], field: str) -> list[float]:
    return [value for row in rows if (value := getattr(row, field)) is not None]


def _median(rows: Sequence[Figures], field: str, digits: int) -> str:
    values = _values(rows, field)
    return f"{statistics.median(values):.{digits}f}" if values else "-"


def _ratio(ours: Sequence[Figures], theirs: Sequence[Figures], field: str) -> float:
    return statistics.median(_values(ours, field)) / statistics.median(_values(theirs, field))


if __name__ == "__main__":
    main()
