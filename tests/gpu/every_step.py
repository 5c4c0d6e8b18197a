"""Steps of small models of every head size, few, for a run under compute-sanitizer.

    PYTHONPATH=.:tests compute-sanitizer --tool memcheck python -m gpu.every_step [--device cuda] [--heads 2x64,…]

A prompt longer than two splits of keys, then single rows of one sequence, of a few and of many, and draws of every
kind. What comes out is checked by test_model.py; here the sanitizer looks on.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from gpu.test_model import HEADS, forward, make_engine, options, random_ids, run_jobs
from tokenwire import _native
from unit.gguf_builder import tiny_llama

PROMPT = 300
STREAMS = (2, 9, 70)  # a row a block, several, and enough that blocks walk over splits
SETTINGS = 8


def steps(folder: Path, device: str, kv_heads: int, head_dim: int) -> int:
    """The number of steps."""
    shape = {"n_embd": 128, "n_ff": 256, "n_heads": 8, "n_kv_heads": kv_heads, "head_dim": head_dim}
    model = tiny_llama(folder / f"{kv_heads}x{head_dim}.gguf", dtype="Q4_0", context=1024, **shape)
    runner = _native.Runner(
        _native.GgufFile(str(model.path)), options(device, max_batch_tokens=512, kv_cache_bytes=256 << 20)
    )
    ids = random_ids(PROMPT, model.vocab_size, seed=2)
    forward(runner, 0, ids[:140])
    for i in range(140, 143):
        forward(runner, 0, ids[i : i + 1])
    forward(runner, 0, ids[143:-1])
    forward(runner, 0, ids[-1:])
    count = 6
    for streams in STREAMS:
        runner.reset()
        for stream in range(streams):
            forward(runner, stream, ids[: 130 if stream < 2 else 1 + stream % 3])
        runner.forward_batch(list(range(streams)), ids[:streams])
        count += streams + 1
    engine = make_engine(model.path, model.vocab_size, device, max_batch_tokens=256, max_running_jobs=SETTINGS)
    run_jobs(engine, [(i, random_ids(20 + i, model.vocab_size, seed=i)) for i in range(SETTINGS)], max_tokens=4)
    return count + engine.stats().num_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    every = ",".join(f"{kv_heads}x{head_dim}" for kv_heads, head_dim in HEADS)
    parser.add_argument("--heads", default=every, help="KV heads of eight, and their size")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.heads.split(","):
            kv_heads, head_dim = (int(part) for part in name.split("x"))
            count = steps(Path(folder), arguments.device, kv_heads, head_dim)
            sys.stdout.write(f"{name}: {count} steps\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
