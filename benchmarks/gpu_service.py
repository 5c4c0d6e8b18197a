"""Times `tokenwire serve` on a GPU through gRPC: start to ready, time to first token, tokens a second of many streams.

    python -m benchmarks.gpu_service MODEL.gguf [MODEL.gguf ...] [--streams 64,256] [--json FILE]

A start is timed from the process's creation to its log line `ready`, with the file in the page cache; the rest is
measured by `tokenwire bench` on the last worker started. Answers have up to `--max-tokens` tokens and are greedy; model
files with random weights (`python -m benchmarks.make_model`) hardly ever end one early, and a run that lost more than
one token in a hundred is an error. Client and worker share the machine's processors.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import free_port
from benchmarks.report import Row, Target, with_target, write_report
from tokenwire import _native
from tokenwire.text import load_text

# By model, format, what, streams and prompt: the H200's figures in docs/cuda.md.
TARGETS = {
    ("qwen2.5-0.5b", "BF16", "start to ready", 1, 0): Target(1.4, 1.0, 0.68),
    ("qwen2.5-0.5b", "BF16", "TTFT through gRPC", 1, 128): Target(5, 3, 8.0),
    ("qwen2.5-0.5b", "BF16", "TTFT through gRPC", 1, 512): Target(7, 4.5, 8.7),
    ("qwen2.5-0.5b", "BF16", "served", 64, 128): Target(28_000, 43_000, 28_351),
    ("qwen2.5-0.5b", "BF16", "served", 256, 128): Target(55_000, 90_000, 55_438),
    ("llama-3.1-8b", "Q4_K", "start to ready", 1, 0): Target(2.0, 1.5, 0.98),
}

START_TIMEOUT_S = 120.0
POLL_S = 0.005


@dataclass
class Worker:
    """A worker that is ready.

    Attributes:
        ready_s: from the creation of its process, within `POLL_S`.
        line: its log line `model_load_complete`.
    """

    target: str
    ready_s: float
    line: dict[str, Any]


@contextlib.contextmanager
def worker(model: Path, device: str, flags: list[str]) -> Iterator[Worker]:
    """Raises RuntimeError with the log if it does not get ready."""
    port = free_port()
    command = [sys.executable, "-m", "tokenwire", "serve", "--model", str(model), "--device", device]
    command += ["--port", str(port), "--log-format", "json", *flags]
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        began_s = time.perf_counter()
        process = subprocess.Popen(command, stderr=log)
        try:
            yield _await_ready(process, Path(log.name), f"127.0.0.1:{port}", began_s)
        finally:
            process.terminate()
            process.wait(timeout=60)


def _await_ready(process: subprocess.Popen[bytes], log: Path, target: str, began_s: float) -> Worker:
    while process.poll() is None and time.perf_counter() - began_s < START_TIMEOUT_S:
        now_s = time.perf_counter()
        written = log.read_text().rpartition("\n")[0]  # whole lines only
        lines = {line["event"]: line for line in map(json.loads, written.splitlines())}
        if "ready" in lines:
            return Worker(target, now_s - began_s, lines["model_load_complete"])
        time.sleep(POLL_S)
    raise RuntimeError(f"the worker did not get ready:\n{log.read_text()}")


def ends_of_answer(model: Path) -> list[int]:
    """Token ids that random weights would now and then end an answer with."""
    text = load_text(_native.GgufFile(str(model)), model)
    try:
        return list(text.stop_token_ids)
    finally:
        text.close()


def bench(
    target: str, banned: Sequence[int], streams: int, requests: int, prompt: int, tokens: int, processes: int
) -> dict[str, Any]:
    """The summary of `tokenwire bench`; every answer has `tokens` tokens."""
    command = [sys.executable, "-m", "tokenwire", "bench", "--target", target, "--json", "-"]
    for token in banned:
        command += ["--ban-token", str(token)]
    for name, value in {
        "concurrency": streams,
        "requests": requests,
        "warmup": streams,
        "prompt-tokens": prompt,
        "max-tokens": tokens,
        "processes": processes,
    }.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"tokenwire bench failed: {done.stderr[-2000:]}")
    summary: dict[str, Any] = json.loads(done.stdout)["summary"]
    if summary["errors"] or summary["tokens_out"] != requests * tokens:
        raise RuntimeError(f"{summary['tokens_out']} tokens of {requests * tokens}, errors {summary['errors']}")
    return summary


def measure(model: Path, arguments: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []

    def report(what: str, streams: int, values: list[float], unit: str, note: str = "", prompt: int = 0) -> None:
        value = statistics.median(values)
        name, kind = str(line["model"]).removesuffix(", random weights"), str(line["quant_kind"])
        runs = [round(run, 4) for run in values]
        row = Row(name, kind, what, streams, prompt, round(value, 4), unit, runs)
        target = TARGETS.get((name, kind, what, streams, prompt))
        rows.append(with_target(row, target))
        spread = f"{min(values):.3f}-{max(values):.3f}"
        wanted = "" if target is None else f", must {target.must:g}, goal {target.goal:g}"
        print(f"{name:16} {what:18} B={streams:<4} {value:10.3f} {unit:6} ({spread}{wanted}) {note}", flush=True)

    model.read_bytes()  # into the page cache
    starts = []
    for _ in range(arguments.runs - 1):
        with worker(model, arguments.device, arguments.flag) as started:
            starts.append(started.ready_s)
    with worker(model, arguments.device, arguments.flag) as ready:
        starts.append(ready.ready_s)
        line = ready.line
        run = functools.partial(bench, ready.target, ends_of_answer(model))
        held = ", ".join(f"{name} {line[name] / 2**20:.0f} MiB" for name in ("weight_bytes", "kv_bytes"))
        report("start to ready", 1, starts, "s", f"load {line['seconds']} s on {line['device_name']}, {held}")
        for prompt in (int(count) for count in arguments.prompts.split(",") if count):
            times = [run(1, 20, prompt, 8, 1)["ttft_ms"]["p50"] for _ in range(arguments.runs)]
            report("TTFT through gRPC", 1, times, "ms", f"prompt {prompt}", prompt)
        for streams in (int(count) for count in arguments.streams.split(",") if count):
            processes = min(arguments.processes, streams)
            runs = [
                run(streams, arguments.waves * streams, 128, arguments.max_tokens, processes)
                for _ in range(arguments.runs)
            ]
            last = runs[-1]
            note = f"TTFT p50 {last['ttft_ms']['p50']:.1f} ms, {last['tokens_per_event']:.2f} tokens an event"
            report("served", streams, [summary["tokens_per_second"] for summary in runs], "tok/s", note, 128)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--streams", default="64,256")
    parser.add_argument("--prompts", default="128,512", help="of the time to first token, tokens")
    parser.add_argument("--waves", type=int, default=4, help="answers that each stream waits for in a run")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--processes", type=int, default=8, help="client processes that share many streams")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--flag", action="append", default=[], help="for `tokenwire serve`, such as --flag=--port=7000")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    rows = [row for model in arguments.models for row in measure(model, arguments)]
    if arguments.json:
        write_report(arguments.json, rows)


if __name__ == "__main__":
    main()
