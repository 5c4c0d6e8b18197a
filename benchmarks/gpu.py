"""Times the engine on a GPU: decode of one and many streams, prefill, load.

    python -m benchmarks.gpu MODEL.gguf [MODEL.gguf ...] [--streams 1,32,256] [--json FILE]

Decode figures are engine steps with greedy sampling, prompt 128, then 128 tokens (`milliseconds a step`): for one
stream the time between its first token and its last, for many the time of 129 tokens less that of 1, which takes the
prefill of all streams out. GB/s are the weight bytes over the step. Medians of `--runs` runs after one that is not
counted. Model files of known shapes with random weights come from `python -m benchmarks.make_model`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

from tokenwire import _native

PROMPT = 128
TOKENS = 129


def open_engine(model: Path, device: str) -> tuple[_native.Engine, float]:
    """An engine that never meets a stop token and keeps no prefix, and the seconds it took to load."""
    options = _native.EngineOptions()
    options.device = device
    options.prefix_cache = False
    options.max_undelivered_tokens = 1 << 20
    options.max_context_tokens = 4096
    options.max_batch_tokens = 2048
    options.max_running_jobs = 256
    options.kv_cache_bytes = 16 << 30
    file = _native.GgufFile(str(model))
    vocabulary = [b"x"] * len(file.get_bytes("tokenizer.ggml.tokens") or ())
    started = time.perf_counter()
    engine = _native.Engine(file, vocabulary, [], options)
    return engine, time.perf_counter() - started


def run(
    engine: _native.Engine, prompt: int, tokens: int, streams: int, seed: int, temperature: float = 0.0
) -> list[_native.Outcome]:
    source = random.Random(seed)
    vocab_size = engine.model_info.vocab_size
    waiting = [
        engine.submit(
            job_id=f"bench-{seed}-{index}",
            model="bench",
            prompt_ids=[source.randrange(vocab_size) for _ in range(prompt)],
            max_tokens=tokens,
            temperature=temperature,
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
        for index in range(streams)
    ]
    outcomes: list[_native.Outcome] = []
    while waiting:
        still = []
        for job in waiting:
            outcome = job.take()[1]
            if outcome is None:
                still.append(job)
            elif outcome.error_code:
                raise RuntimeError(outcome.error_message)
            else:
                outcomes.append(outcome)
        waiting = still
        time.sleep(0.001)
    return outcomes


def duration_ms(engine: _native.Engine, tokens: int, streams: int, seed: int) -> float:
    """Of `streams` jobs at once, from the first's submission to the last's end."""
    started = time.perf_counter()
    run(engine, PROMPT, tokens, streams, seed)
    return (time.perf_counter() - started) * 1e3


def bench(model: Path, device: str, streams: list[int], runs: int) -> list[dict[str, object]]:
    engine, load_s = open_engine(model, device)
    info = engine.model_info
    rows: list[dict[str, object]] = []

    def report(what: str, batch: int, values: list[float], unit: str, note: str) -> None:
        value = statistics.median(values)
        row = {"model": model.stem, "format": info.quant_kind, "what": what, "batch": batch}
        rows.append({**row, "value": round(value, 4), "unit": unit, "runs": values})
        spread = f"{min(values):.3f}-{max(values):.3f}"
        print(f"{model.stem:28} {what:12} B={batch:<4} {value:9.3f} {unit:3} ({spread})  {note}")
        sys.stdout.flush()

    report("load", 1, [load_s], "s", f"{info.weight_bytes / 1e6:.0f} MB of weights")
    for count in streams:
        run(engine, PROMPT, TOKENS, count, seed=99)
        steps = []
        for seed in range(runs):
            if count == 1:
                steps.append(run(engine, PROMPT, TOKENS, 1, seed)[0].decode_ms / (TOKENS - 1))
                continue
            whole = duration_ms(engine, TOKENS, count, seed)
            steps.append((whole - duration_ms(engine, 1, count, seed)) / (TOKENS - 1))
        step = statistics.median(steps)
        note = f"{count / step * 1e3:.0f} tok/s, {info.weight_bytes / step / 1e6:.0f} GB/s of weights"
        report("decode", count, steps, "ms", note)
    for prompt in (512, 2048):
        run(engine, prompt, 1, 1, seed=99)
        times = [run(engine, prompt, 1, 1, seed)[0].prefill_ms for seed in range(runs)]
        report(f"prefill {prompt}", 1, times, "ms", f"{prompt / statistics.median(times) * 1e3:.0f} tok/s")
    drawn = [run(engine, PROMPT, TOKENS, 1, seed, 0.8)[0].decode_ms / (TOKENS - 1) for seed in range(runs)]
    report("decode, drawn", 1, drawn, "ms", "temperature 0.8")
    engine.stop()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--streams", default="1,32,256")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    streams = [int(count) for count in arguments.streams.split(",")]
    rows = [row for model in arguments.models for row in bench(model, arguments.device, streams, arguments.runs)]
    if arguments.json:
        arguments.json.write_text(json.dumps({"command": sys.argv, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
