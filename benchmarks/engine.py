"""Times the engine without gRPC: prefill, decode at depth, and decode of many streams.

    python -m benchmarks.engine MODEL.gguf [--llama-bench PATH --llama-batched-bench PATH [--peer-model PATH]]

With a peer's programs, both are run in turns in the same process tree and the ratio of each pair's medians is printed,
since absolute times on a shared machine mean little. Peers: llama.cpp's `llama-bench` and `llama-batched-bench`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tokenwire import _native


@dataclass(frozen=True)
class Case:
    """`streams` sequences of `prompt` tokens each generate `tokens`; a prefill case times the prompts instead."""

    name: str
    prompt: int
    tokens: int
    streams: int = 1
    prefill: bool = False


CASES = (
    Case("prefill 512", prompt=512, tokens=1, prefill=True),
    Case("decode, depth 0", prompt=1, tokens=129),
    Case("decode, depth 1024", prompt=1024, tokens=65),
    Case("decode, 4 streams", prompt=64, tokens=129, streams=4),
    Case("decode, 16 streams", prompt=64, tokens=129, streams=16),
    Case("decode, 32 streams", prompt=64, tokens=129, streams=32),
)


def open_engine(model: Path, threads: int) -> _native.Engine:
    """An engine that never meets a stop token and keeps no prefix."""
    options = _native.EngineOptions()
    options.num_threads = threads
    options.prefix_cache = False
    options.max_undelivered_tokens = 1 << 20
    file = _native.GgufFile(str(model))
    vocab_size = len(file.get_bytes("tokenizer.ggml.tokens") or ())
    return _native.Engine(file, [b"x"] * vocab_size, [], options)


def run_case(engine: _native.Engine, case: Case, seed: int) -> float:
    """Tokens a second of one run."""
    source = random.Random(seed)
    vocab_size = engine.model_info.vocab_size
    prompts = [[source.randrange(1000, vocab_size) for _ in range(case.prompt)] for _ in range(case.streams)]
    submitted = []

    def submit(index: int) -> _native.Job:
        submitted.append(time.monotonic())
        return engine.submit(
            job_id=f"bench-{index}",
            model="bench",
            prompt_ids=prompts[index],
            max_tokens=case.tokens,
            temperature=0.0,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            repetition_penalty=1.0,
            frequency_penalty=0.0,
            presence_penalty=0.0,
            logit_bias={},
            logprobs=-1,
            stop=[],
            seed=index,
            timeout_ms=0,
            cache_salt=b"",
        )

    waiting = dict(enumerate([submit(index) for index in range(case.streams)]))
    ended: dict[int, _native.Outcome] = {}
    while waiting:
        for index in [*waiting]:
            outcome = waiting[index].take()[1]
            if outcome is not None:
                ended[index] = outcome
                del waiting[index]
        time.sleep(0.02)
    outcomes = [ended[index] for index in range(case.streams)]
    failed = [outcome.error_message for outcome in outcomes if outcome.error_code]
    if failed:
        raise RuntimeError(failed[0])
    if case.prefill:
        return case.prompt * case.streams / (sum(outcome.prefill_ms for outcome in outcomes) / 1000)
    return decode_rate(case, submitted, outcomes)


def decode_rate(case: Case, submitted: list[float], outcomes: list[_native.Outcome]) -> float:
    """Tokens a second while all streams decode: from the last one's first token to the first one's last.

    Before that some prompts are still being read and after it some streams have ended. Each step before it gave some
    stream its first token, so the steps that the first stream took by then are the distinct times of first tokens.
    """
    first_tokens = [at + outcome.first_token_ms / 1000 for at, outcome in zip(submitted, outcomes, strict=True)]
    ends = [at + outcome.decode_ms / 1000 for at, outcome in zip(first_tokens, outcomes, strict=True)]
    in_order = sorted(first_tokens)
    steps_before = sum(later - earlier > 0.001 for earlier, later in pairwise(in_order))
    return case.streams * (case.tokens - 1 - steps_before) / (min(ends) - in_order[-1])


def peer_run(case: Case, bench: Path, batched: Path, model: Path, threads: int) -> float:
    """The same case by llama.cpp, tokens a second."""
    if case.streams == 1:
        shape = ["-p", str(case.prompt), "-n", "0"] if case.prefill else ["-p", "0", "-n", str(case.tokens - 1)]
        if not case.prefill and case.prompt > 1:
            shape += ["-d", str(case.prompt)]
        command = [str(bench), "-m", str(model), "-t", str(threads), "-r", "1", "-o", "json", *shape]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        return float(json.loads(result.stdout)[0]["avg_ts"])
    command = [str(batched), "-m", str(model), "-t", str(threads), "-b", "2048", "-ub", "512"]
    command += ["-c", str(max(1024, case.streams * 256)), "-npp", str(case.prompt), "-ntg", str(case.tokens - 1)]
    command += ["-npl", str(case.streams), "--output-format", "jsonl"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    return float(rows[-1]["speed_tg"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--llama-bench", type=Path)
    parser.add_argument("--llama-batched-bench", type=Path)
    parser.add_argument("--peer-model", type=Path, help="the peer's file, if not the same")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()

    engine = open_engine(arguments.model, arguments.threads)
    run_case(engine, CASES[1], seed=0)
    peer: Callable[[Case], float] | None = None
    if arguments.llama_bench:
        peer_model = arguments.peer_model or arguments.model

        def peer(case: Case) -> float:
            return peer_run(case, arguments.llama_bench, arguments.llama_batched_bench, peer_model, arguments.threads)

    print(f"{arguments.model.name}, {arguments.threads} threads, {_native.cpu_isa()}, medians of {arguments.runs} runs")
    report = []
    for case in CASES:
        if arguments.only not in case.name:
            continue
        ours, theirs = [], []
        for run in range(arguments.runs):
            ours.append(run_case(engine, case, seed=run))
            if peer is not None:
                theirs.append(peer(case))
        row = {"case": case.name, "tokens_per_second": ours, "peer_tokens_per_second": theirs}
        line = f"{case.name:20}  {statistics.median(ours):8.1f} tok/s  ({min(ours):.0f}–{max(ours):.0f})"
        if theirs:
            ratio = statistics.median(ours) / statistics.median(theirs)
            row["ratio"] = ratio
            line += (
                f"   peer {statistics.median(theirs):8.1f} ({min(theirs):.0f}–{max(theirs):.0f})   ratio {ratio:.2f}"
            )
        print(line)
        sys.stdout.flush()
        report.append(row)
    engine.stop()
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
