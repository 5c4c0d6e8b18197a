"""Flow control on the compiled engine: slow readers, deadlines, full queues and pools."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.helpers import (
    BLOCK_TOKENS,
    Request,
    Transcript,
    make_engine,
    read_to_end,
    run_alone,
    settle,
    wait_until,
)
from tokenwire import _native
from unit.gguf_builder import tiny_llama

UNDELIVERED = 8
# Keeps an answer going to its token count, and each token whole text: no end of generation, no part of a character.
PLAIN = tuple((token, -100.0) for token in (0, 2, *range(3 + 128, 3 + 256)))
CONTEXT = 8192


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Deep enough that a step takes longer than looking at the engine."""
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return tiny_llama(path, dtype="Q4_1", context=CONTEXT, n_layers=8, n_embd=256, n_ff=512).path


@pytest.fixture
def engines(tiny: Path) -> Iterator[Any]:
    """Makes engines of one thread on the tiny model."""
    made = []

    def make(**options: Any) -> Any:
        engine = make_engine(_native, tiny, **{"num_threads": 1, "prefix_cache": False, **options})
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.stop()


def request(seed: int, *, prompt: int = 20, max_tokens: int = 30) -> Request:
    """A request that ends by its token count only."""
    ids = tuple(3 + (seed * 7919 + i * 31) % 256 for i in range(prompt))
    return Request(prompt=ids, max_tokens=max_tokens, seed=seed, temperature=1.0, logit_bias=PLAIN)


def blocks_of(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS)


# --- Slow readers. ---


def test_a_reader_that_takes_nothing_pauses_only_itself(engines: Any) -> None:
    engine = engines(max_undelivered_tokens=UNDELIVERED, slow_reader_timeout_ms=60_000)
    slow = request(1, max_tokens=100).submit(engine, "slow")
    wait_until("the slow reader's share is full", lambda: slow.num_tokens_out >= UNDELIVERED)
    held = blocks_of(20 + UNDELIVERED)
    for seed in range(2, 8):
        before = engine.stats().num_steps
        transcript, outcome = read_to_end(engine, request(seed, max_tokens=40).submit(engine, "fast"))
        steps = engine.stats().num_steps - before
        assert (outcome.error_code, transcript.num_tokens) == ("", 40)
        assert steps <= 42, "a stream of 40 tokens keeps its pace of one step a token"
    assert slow.num_tokens_out == UNDELIVERED
    wait_until("only what the slow reader computed is kept", lambda: engine.stats().used_blocks == held)
    transcript, outcome = read_to_end(engine, slow)
    assert (outcome.error_code, transcript.num_tokens) == ("", 100)
    settle(engine)


def test_a_pause_changes_no_byte(engines: Any) -> None:
    engine = engines(max_undelivered_tokens=3)
    expected = run_alone(engines(), request(1, max_tokens=40))
    job = request(1, max_tokens=40).submit(engine, "slow")
    transcript, outcome = Transcript(), None
    while outcome is None:
        wait_until("its share is full or it ended", lambda: job.num_tokens_out >= min(transcript.num_tokens + 3, 40))
        messages, outcome = job.take()
        transcript.add(messages)
    assert transcript.answer() == expected


def test_waiting_tokens_travel_in_one_event(engines: Any) -> None:
    engine = engines(max_undelivered_tokens=UNDELIVERED)
    job = request(1, max_tokens=100).submit(engine, "slow")
    wait_until("the slow reader's share is full", lambda: job.num_tokens_out >= UNDELIVERED)
    messages, outcome = job.take()
    transcript = Transcript()
    transcript.add(messages)
    assert outcome is None
    assert (len(messages), transcript.num_token_events, transcript.num_tokens) == (2, 1, UNDELIVERED)
    transcript, _ = read_to_end(engine, job, transcript)
    assert transcript.answer() == run_alone(engines(), request(1, max_tokens=100))


def test_a_reader_that_takes_nothing_for_too_long_loses_its_stream(engines: Any) -> None:
    engine = engines(max_undelivered_tokens=UNDELIVERED, slow_reader_timeout_ms=300)
    started = time.monotonic()
    slow = request(1, max_tokens=100).submit(engine, "slow")
    wait_until("its blocks are free", lambda: slow.num_tokens_out > 0 and engine.stats().active_jobs == 0)
    elapsed_s = time.monotonic() - started
    messages, outcome = slow.take()
    assert outcome.error_code == "SLOW_CONSUMER"
    assert 0.3 <= elapsed_s < 5
    transcript = Transcript()
    transcript.add(messages)
    assert transcript.num_tokens == outcome.tokens_out == UNDELIVERED
    assert slow.take() == ([], None)
    settle(engine)


def test_an_engine_that_waits_for_a_slow_reader_does_not_spin(engines: Any) -> None:
    engine = engines(kv_blocks=4, max_undelivered_tokens=UNDELIVERED, slow_reader_timeout_ms=60_000)
    slow = request(1, prompt=40, max_tokens=20).submit(engine, "slow")
    wait_until("the slow reader's share is full", lambda: slow.num_tokens_out >= UNDELIVERED)
    waiting = request(2, prompt=40, max_tokens=2).submit(engine, "waiting")
    wait_until("the pool has no room for it", lambda: engine.stats().queued_jobs == 1)
    before = time.process_time()
    time.sleep(0.5)
    busy_s = time.process_time() - before
    assert busy_s < 0.25
    slow.cancel()
    assert read_to_end(engine, waiting)[1].error_code == ""
    settle(engine)


# --- Deadlines. ---


def test_a_deadline_is_honoured_in_the_queue(engines: Any) -> None:
    engine = engines(max_running_jobs=1, max_undelivered_tokens=UNDELIVERED)
    running = request(1, max_tokens=1000).submit(engine, "running")
    wait_until("it runs", lambda: running.num_tokens_out > 0)
    started = time.monotonic()
    transcript, outcome = read_to_end(engine, request(2).submit(engine, "queued", timeout_ms=100))
    elapsed_ms = (time.monotonic() - started) * 1000
    assert outcome.error_code == "INFERENCE_TIMEOUT"
    assert transcript.started is None
    assert 99 <= elapsed_ms < 1000
    assert engine.stats().queued_jobs == 0
    running.cancel()
    settle(engine)


def test_a_deadline_is_honoured_in_prefill(engines: Any) -> None:
    engine = engines(max_batch_tokens=16)
    job = request(1, prompt=8000, max_tokens=10).submit(engine, "long", timeout_ms=250)
    started = time.monotonic()
    transcript, outcome = read_to_end(engine, job)
    elapsed_ms = (time.monotonic() - started) * 1000
    assert outcome.error_code == "INFERENCE_TIMEOUT"
    assert transcript.started is not None
    assert (transcript.num_tokens, outcome.tokens_out) == (0, 0)
    assert 240 <= elapsed_ms < 2000
    settle(engine)


def test_a_deadline_is_honoured_in_decode(engines: Any) -> None:
    engine = engines(max_undelivered_tokens=8000)
    job = request(1, max_tokens=8000).submit(engine, "long", timeout_ms=250)
    started = time.monotonic()
    transcript, outcome = read_to_end(engine, job)
    elapsed_ms = (time.monotonic() - started) * 1000
    assert outcome.error_code == "INFERENCE_TIMEOUT"
    assert 0 < transcript.num_tokens == outcome.tokens_out < 8000
    assert 240 <= elapsed_ms < 2000
    settle(engine)


# --- Full queues and pools. ---


def refusal(engine: Any, refused: Request) -> str:
    with pytest.raises(_native.EngineError) as caught:
        refused.submit(engine, "refused")
    return str(caught.value.code)


def test_a_full_inbox_refuses_and_recovers(engines: Any) -> None:
    engine = engines(max_running_jobs=1, max_queued_jobs=4, max_undelivered_tokens=UNDELIVERED)
    running = request(0, max_tokens=1000).submit(engine, "running")
    wait_until("it runs", lambda: running.num_tokens_out > 0)
    queued = [request(seed).submit(engine, f"queued-{seed}") for seed in range(4)]
    assert refusal(engine, request(9)) == "OVERLOADED"
    queued[0].cancel()
    wait_until("a place is free", lambda: engine.stats().queued_jobs == 3)
    queued.append(request(10).submit(engine, "queued-10"))
    running.cancel()
    for job in queued[1:]:
        assert read_to_end(engine, job)[1].error_code == ""
    settle(engine)


def test_waiting_prompt_tokens_are_bounded(engines: Any) -> None:
    engine = engines(max_running_jobs=1, max_queued_tokens=1000, max_undelivered_tokens=UNDELIVERED)
    running = request(0, max_tokens=1000).submit(engine, "running")
    wait_until("it runs", lambda: running.num_tokens_out > 0)
    queued = request(1, prompt=800).submit(engine, "queued")
    assert refusal(engine, request(2, prompt=201)) == "OVERLOADED"
    request(3, prompt=200).submit(engine, "fits")
    running.cancel()
    assert read_to_end(engine, queued)[1].error_code == ""
    engine.fail_all("UNAVAILABLE", "over")
    settle(engine)


def test_what_can_never_fit_is_refused_at_once_and_what_fits_later_waits(engines: Any) -> None:
    engine = engines(kv_blocks=8, max_undelivered_tokens=UNDELIVERED)
    assert refusal(engine, request(1, prompt=100, max_tokens=29)) == "KV_CAPACITY"
    holder = request(2, prompt=100, max_tokens=28).submit(engine, "holder")
    wait_until("it is paused", lambda: holder.num_tokens_out == UNDELIVERED)
    waiting = request(3, prompt=100, max_tokens=28).submit(engine, "waiting")
    wait_until("it waits", lambda: engine.stats().queued_jobs == 1)
    assert read_to_end(engine, holder)[1].error_code == ""
    assert read_to_end(engine, waiting)[1].error_code == ""
    settle(engine)
