"""Thousands of short jobs, many of them cancelled: nothing may be left behind."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from e2e.helpers import Request, make_engine, poll_output, say, settle
from tokenwire import _native
from unit.gguf_builder import tiny_llama

NUM_JOBS = 10_000
CANCEL_SHARE = 0.4  # some are over before their cancel comes
LIVE = 48
SAMPLES = 20
# Memory may settle during the first part; after it, growth is a leak. Pages of one sample are the measure's noise.
WARM_UP = 0.25
MOST_GROWTH_BYTES = 2 * 2**20


def random_request(rng: random.Random) -> Request:
    return Request(
        prompt=tuple(rng.randrange(3, 259) for _ in range(rng.randint(1, 60))),
        max_tokens=rng.randint(1, 40),
        seed=rng.getrandbits(64),
        temperature=rng.choice((0.0, 1.0)),
        repetition_penalty=rng.choice((1.0, 1.3)),
        logprobs=rng.choice((-1, 2)),
        stop=rng.choice(((), ("e", "the"))),
        salt=rng.choice((b"", b"tenant")),
    )


def soak(engine: Any, num_jobs: int, seed: int) -> list[int]:
    """Runs the jobs, a good part of them cancelled at a random moment; resident bytes at `SAMPLES` moments."""
    rng = random.Random(seed)
    process = psutil.Process()
    live: dict[int, Any] = {}
    cancel_after: dict[int, int] = {}  # times that output was taken
    outcomes = dict.fromkeys(("", "CANCELLED"), 0)
    resident: list[int] = []
    submitted = 0
    while submitted < num_jobs or live:
        while submitted < num_jobs and len(live) < LIVE:
            job = random_request(rng).submit(engine, f"job-{submitted}")
            submitted += 1
            live[job.handle] = job
            if rng.random() < CANCEL_SHARE:
                cancel_after[job.handle] = rng.choice((0, 0, 1, 2))
                if cancel_after[job.handle] == 0:
                    job.cancel()
            if submitted % (num_jobs // SAMPLES) == 0:
                resident.append(process.memory_info().rss)
        for handle in poll_output(engine, 30):
            if handle not in live:
                continue
            _, outcome = live[handle].take()
            if outcome is not None:
                outcomes[outcome.error_code] += 1
                del live[handle]
                cancel_after.pop(handle, None)
            elif handle in cancel_after:
                cancel_after[handle] -= 1
                if cancel_after[handle] == 0:
                    live[handle].cancel()
    assert sum(outcomes.values()) == num_jobs
    share = outcomes["CANCELLED"] / num_jobs
    assert 0.25 < share < 0.4, f"{share:.0%} were cancelled"
    say(f"{num_jobs} jobs, {share:.0%} cancelled")
    return resident


def run_soak(model: Path) -> None:
    process = psutil.Process()
    engine = make_engine(_native, model, kv_blocks=56, num_threads=2, max_batch_tokens=128)
    soak(engine, 500, seed=1)
    fds, threads = process.num_fds(), process.num_threads()
    started = time.monotonic()
    resident = soak(engine, NUM_JOBS, seed=2)
    elapsed_s = time.monotonic() - started
    stats = settle(engine)
    after_warm_up = resident[int(len(resident) * WARM_UP) :]
    slope, _ = statistics.linear_regression(range(len(after_warm_up)), after_warm_up)
    growth = slope * len(after_warm_up)
    say(
        f"{NUM_JOBS} jobs in {elapsed_s:.1f} s: {stats.num_generated_tokens} tokens in {stats.num_steps} steps, "
        f"{stats.num_preemptions} preemptions; resident {resident[0] >> 10} to {resident[-1] >> 10} KiB, "
        f"{growth / 1024:+.0f} KiB after warm-up; {fds} descriptors, {threads} threads"
    )
    assert growth <= MOST_GROWTH_BYTES
    assert (process.num_fds(), process.num_threads()) == (fds, threads)
    assert (stats.active_jobs, stats.queued_jobs, stats.used_blocks) == (0, 0, 0)
    assert stats.num_preemptions > 0
    engine.stop()
    del engine
    # The engine's own threads and its wake-up descriptor go with it.
    assert process.num_threads() == threads - 2
    assert process.num_fds() == fds - 1


def test_many_jobs_and_cancels_leave_nothing_behind(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "tiny.gguf", dtype="Q4_1", context=256).path
    # In a process of its own: threads and descriptors that other tests leave behind come and go while they are counted.
    program = f"from pathlib import Path; from e2e.test_soak import run_soak; run_soak(Path({str(model)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    say(done.stdout)
    assert done.returncode == 0, done.stderr
