"""The determinism gate (W-42): requests alone, then in a crowd, and every byte of both answers compared.

As a program it runs a small gate against any build of the engine and prints what differed as JSON; the tests use that
for other instruction sets and for engines that were broken on purpose.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from e2e.helpers import (
    Answer,
    Request,
    Transcript,
    make_engine,
    poll_output,
    run_alone,
    settle,
    tiny_vocabulary_bytes,
    wait_output,
)

LONGEST_PROMPT = 560
LONGEST_ANSWER = 80
CONTEXT = 640
NO_LIMIT_MS = 3_600_000  # no clock decides how an answer ends, however busy the machine is


def make_requests(count: int, seed: int, longest_prompt: int = LONGEST_PROMPT) -> list[Request]:
    """Random requests: short and long prompts, shared beginnings, every sampling field, stops that do occur."""
    rng = random.Random(seed)
    words = tiny_vocabulary_bytes()
    stops = [word.decode() for word in words if word.isascii() and word]

    def ids(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(len(words)) for _ in range(length))

    prefixes = [ids(length) for length in (16, 33, 64, 100, 180, 320) if length < longest_prompt]

    def prompt() -> tuple[int, ...]:
        kind = rng.random()
        if kind < 0.45:
            return ids(rng.randint(1, 40))
        if kind < 0.8:
            prefix = rng.choice(prefixes)
            return prefix[: rng.choice((len(prefix), rng.randint(1, len(prefix))))] + ids(rng.randint(1, 20))
        if kind < 0.96:
            return ids(rng.randint(40, min(200, longest_prompt)))
        return ids(rng.randint(longest_prompt // 2, longest_prompt))

    def sometimes(share: float, value: Any, otherwise: Any) -> Any:
        return value if rng.random() < share else otherwise

    requests = []
    for _ in range(count):
        bias = tuple((token, rng.uniform(-20, 4)) for token in sorted(rng.sample(range(len(words)), 4)))
        request = Request(
            prompt=prompt(),
            max_tokens=rng.choice((1, 8, 20, 40, 40, LONGEST_ANSWER)),
            seed=rng.getrandbits(64),
            temperature=sometimes(0.4, 0.0, rng.choice((0.3, 0.7, 1.0, 1.8))),
            top_p=sometimes(0.3, rng.uniform(0.1, 0.99), 1.0),
            top_k=sometimes(0.3, rng.choice((1, 2, 20, 200)), 0),
            min_p=sometimes(0.2, rng.uniform(0.01, 0.3), 0.0),
            repetition_penalty=sometimes(0.3, rng.uniform(0.8, 1.6), 1.0),
            frequency_penalty=sometimes(0.2, rng.uniform(-1, 2), 0.0),
            presence_penalty=sometimes(0.2, rng.uniform(-1, 2), 0.0),
            logit_bias=sometimes(0.2, bias, ()),
            logprobs=rng.choice((-1, 0, 1, 5, 20)),
            stop=sometimes(0.4, tuple(rng.choices(stops, k=rng.randint(1, 4))), ()),
            salt=rng.choice((b"", b"", b"tenant")),
        )
        requests.append(request)
    return requests


@dataclass
class Crowd:
    """What a run under load gave."""

    answers: list[Answer]
    num_cancelled: int = 0
    num_neighbours: int = 0
    num_stalls: int = 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    largest_batch: int = 0  # at least


@dataclass
class _Live:
    job: Any
    index: int | None  # of the request; None for a neighbour that will be cancelled
    cancel_after: int = 0  # tokens
    cancelled: bool = False
    transcript: Transcript = field(default_factory=Transcript)


def run_crowd(
    engine: Any,
    requests: Sequence[Request],
    *,
    seed: int,
    most_live: int,
    least_live: int = 16,
    neighbours: Sequence[Request] = (),
    cancel_share: float = 0.25,
    stall_share: float = 0.05,
) -> Crowd:
    """Runs all requests in random order, `least_live` to `most_live` at once.

    Args:
        neighbours: further requests, each cancelled after a random number of its tokens.
        cancel_share: of the submitted jobs, how many are neighbours.
        stall_share: how often a reader lets output lie for a while.
    """
    rng = random.Random(seed)
    order = list(range(len(requests)))
    rng.shuffle(order)
    answers: dict[int, Answer] = {}
    crowd = Crowd([])
    live: dict[int, _Live] = {}
    stalled: list[int] = []
    before = engine.stats()

    def submit() -> None:
        if neighbours and rng.random() < cancel_share:
            job = rng.choice(neighbours).submit(engine, f"neighbour-{crowd.num_neighbours}")
            crowd.num_neighbours += 1
            live[job.handle] = _Live(job, None, rng.choice((0, 0, 1, 5, 15)))
        else:
            index = order.pop()
            job = requests[index].submit(engine, f"job-{index}")
            live[job.handle] = _Live(job, index)

    def take(handle: int) -> None:
        entry = live[handle]
        messages, outcome = entry.job.take()
        entry.transcript.add(messages)
        if entry.index is None and not entry.cancelled and entry.transcript.num_tokens >= entry.cancel_after:
            entry.job.cancel()
            entry.cancelled = True
        if outcome is None:
            return
        del live[handle]
        if entry.index is None:
            crowd.num_cancelled += outcome.error_code == "CANCELLED"
            return
        assert outcome.error_code == "", outcome.error_message
        answers[entry.index] = entry.transcript.answer()
        assert outcome.digest in entry.transcript.answer().end.decode(errors="replace")

    target = most_live
    while order or live:
        while order and len(live) < target:
            submit()
        ready = poll_output(engine, 0.02) if stalled else wait_output(engine)
        if rng.random() < 0.05:
            target = rng.randint(least_live, most_live)
        for handle in [handle for handle in ready if handle in live]:
            if rng.random() < stall_share:
                stalled.append(handle)
                crowd.num_stalls += 1
            else:
                take(handle)
        # Readers that let output lie may hold all there is to hold: then the engine is silent until they take it.
        if stalled and (rng.random() < 0.1 or not ready):
            for handle in stalled:
                if handle in live:
                    take(handle)
            stalled.clear()
    stats = settle(engine)
    crowd.largest_batch = _largest_batch(before, stats)
    crowd.answers = [answers[index] for index in range(len(requests))]
    crowd.num_preemptions = stats.num_preemptions - before.num_preemptions
    crowd.num_cached_tokens = stats.num_cached_tokens - before.num_cached_tokens
    return crowd


def _largest_batch(before: Any, after: Any) -> int:
    """Of the steps between, what the fullest held at least; the engine counts them all, by ranges."""
    histogram = after.batch_size
    counts = [new - old for new, old in zip(histogram.counts, before.batch_size.counts, strict=True)]
    last = max((place for place, count in enumerate(counts) if count > 0), default=0)
    return int(histogram.bounds[last - 1]) + 1 if last > 0 else 0


@dataclass(frozen=True)
class Setting:
    """An engine under load."""

    num_threads: int
    max_batch_tokens: int
    kv_blocks: int
    prefix_cache: bool
    most_live: int
    least_live: int = 16
    run_ahead: bool = True


# The smallest pool holds just the longest request. Answers of one engine's first pass are from a cold
# prefix cache, of its second from a warm one.
SETTINGS = (
    Setting(1, 16, 40, True, 16),
    Setting(2, 64, 56, True, 32),
    Setting(2, 512, 110, False, 64),
    Setting(1, 128, 72, True, 48),
    Setting(2, 33, 48, False, 24),
    Setting(2, 256, 130, True, 64),
)


@dataclass
class Report:
    """Counts of a gate run; `differing` must be 0."""

    num_requests: int = 0
    num_comparisons: int = 0
    num_bytes: int = 0
    num_tokens: int = 0
    differing: int = 0
    fields: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    stop_reasons: Counter[int] = field(default_factory=Counter)
    num_cancelled: int = 0
    num_stalls: int = 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    largest_batch: int = 0  # at least

    def compare(self, name: str, expected: Answer, actual: Answer) -> None:
        self.num_comparisons += 1
        self.num_bytes += expected.num_bytes
        different = expected.differences(actual)
        if different:
            self.differing += 1
            self.fields.update(different)
            if len(self.examples) < 5:
                self.examples.append(f"{name}: {different}: {expected.ids} became {actual.ids}")

    def add(self, crowd: Crowd) -> None:
        self.num_cancelled += crowd.num_cancelled
        self.num_stalls += crowd.num_stalls
        self.num_preemptions += crowd.num_preemptions
        self.num_cached_tokens += crowd.num_cached_tokens
        self.largest_batch = max(self.largest_batch, crowd.largest_batch)


def run_gate(
    native: Any,
    path: Path,
    num_requests: int,
    seed: int,
    settings: Sequence[Setting] = SETTINGS,
    passes: int = 1,
    device: str = "cpu",
) -> Report:
    """Compares `num_requests` requests alone with `passes` times the same, shared out among engines under load.

    With a prefix cache each load is run twice: the first time cold, the second time warm.
    """
    requests = make_requests(num_requests, seed)
    neighbours = make_requests(64, seed + 1)
    report = Report(num_requests=num_requests)
    quiet = make_engine(native, path, device=device, num_threads=1, prefix_cache=False, max_batch_tokens=256)
    alone = [run_alone(quiet, request) for request in requests]
    settle(quiet)
    quiet.stop()
    report.num_tokens = sum(len(answer.ids) for answer in alone)
    report.stop_reasons.update(answer.stop_reason for answer in alone)
    for turn in range(passes):
        for place, setting in enumerate(settings):
            # Every request meets another engine in each pass.
            share = [i for i in range(num_requests) if (i + turn) % len(settings) == place]
            engine = make_engine(
                native,
                path,
                device=device,
                kv_blocks=setting.kv_blocks,
                num_threads=setting.num_threads,
                max_batch_tokens=setting.max_batch_tokens,
                prefix_cache=setting.prefix_cache,
                run_ahead=setting.run_ahead,
                max_undelivered_tokens=6,
                slow_reader_timeout_ms=NO_LIMIT_MS,
            )
            for warmth in ("cold", "warm") if setting.prefix_cache else ("uncached",):
                crowd = run_crowd(
                    engine,
                    [requests[i] for i in share],
                    seed=seed + turn * 100 + place,
                    most_live=setting.most_live,
                    least_live=setting.least_live,
                    neighbours=neighbours,
                )
                report.add(crowd)
                for i, answer in zip(share, crowd.answers, strict=True):
                    report.compare(f"request {i}, {warmth}, {setting}", alone[i], answer)
            engine.stop()
    return report


def load_native(path: Path) -> Any:
    """An engine module from a file, whatever package it was built for."""
    spec = importlib.util.spec_from_file_location("_native", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--native", type=Path, required=True, help="the compiled engine module")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    native = load_native(arguments.native)
    report = run_gate(native, arguments.model, arguments.requests, arguments.seed)
    json.dump({"isa": native.cpu_isa(), **vars(report)}, sys.stdout)


if __name__ == "__main__":
    main()
