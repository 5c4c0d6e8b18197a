"""Where a step's time goes: each operation's share, bytes and bandwidth, against what one core reads.

python -m benchmarks.ops MODEL.gguf [--depth N] [--streams N] [--prefill N]
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import numpy as np

from tokenwire import _native


def read_bandwidth(num_bytes: int) -> float:
    """GB/s at which one core reads an array of this size; the best of several runs."""
    array = np.ones(num_bytes // 8, dtype=np.int64)
    best = 0.0
    for _ in range(12):
        begin = time.perf_counter()
        array.max()
        best = max(best, array.nbytes / (time.perf_counter() - begin) / 1e9)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--depth", type=int, default=1, help="tokens in the cache before the steps that are timed")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--prefill", type=int, default=0, help="time a prompt of this many tokens instead")
    arguments = parser.parse_args()

    options = _native.EngineOptions()
    options.num_threads = arguments.threads
    runner = _native.Runner(_native.GgufFile(str(arguments.model)), options)
    source = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [source.randrange(1000, runner.model_info.vocab_size) for _ in range(count)]

    def prepare() -> None:
        runner.reset()
        if not arguments.prefill:
            for stream in range(arguments.streams):
                runner.forward(stream, tokens(arguments.depth))

    prepare()
    if arguments.prefill:
        runner.forward(-1, tokens(arguments.prefill))
        prepare()
    runner.reset_profile()
    begin = time.perf_counter()
    if arguments.prefill:
        for run in range(5):
            runner.forward(run, tokens(arguments.prefill))
        count = 5 * arguments.prefill
    else:
        for _ in range(arguments.steps):
            runner.forward_batch(list(range(arguments.streams)), tokens(arguments.streams))
        count = arguments.steps * arguments.streams
    seconds = time.perf_counter() - begin

    profile = runner.profile()
    total = sum(entry[1] for entry in profile.values())
    print(f"{count / seconds:.1f} tok/s, {seconds * 1e3 / count:.3f} ms a token, {total / seconds:.1%} in operations")
    bandwidth = read_bandwidth(runner.model_info.weight_bytes)
    print(f"one core reads a model-sized array at {bandwidth:.1f} GB/s")
    print(f"{'operation':26} {'share':>6} {'us a call':>10} {'MB a call':>10} {'GB/s':>7}")
    for name, (calls, spent, num_bytes) in sorted(profile.items(), key=lambda item: -item[1][1]):
        rate = f"{num_bytes / spent / 1e9:7.1f}" if num_bytes else ""
        print(f"{name:26} {spent / total:6.1%} {spent / calls * 1e6:10.1f} {num_bytes / calls / 1e6:10.2f} {rate}")


if __name__ == "__main__":
    main()
