"""A stand-in for `_native.Engine` whose every step a test takes by hand. It keeps the engine's promises about events,
outcomes, handles and the wake-up descriptor, and computes nothing."""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class FakeEngineError(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class FakeOutcome:
    error_code: str = ""
    error_message: str = ""
    stop_reason: str = ""
    stop_sequence: str = ""
    digest: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    cached_tokens: int = 0
    queue_ms: float = 0.5
    prefill_ms: float = 1.0
    first_token_ms: float = 1.5
    decode_ms: float = 2.0
    cache_lookup_ms: float = 0.25


@dataclass
class FakeHistogram:
    bounds: list[float] = field(default_factory=lambda: [0.01, 0.1, 1.0])
    counts: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    sum: float = 0.0


@dataclass
class FakeStats:
    active_jobs: int = 0
    queued_jobs: int = 0
    total_blocks: int = 100
    used_blocks: int = 0
    cached_blocks: int = 0
    block_tokens: int = 16
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    num_cache_hits: int = 0
    num_cache_misses: int = 0
    num_evictions: int = 0
    inter_token_s: FakeHistogram = field(default_factory=FakeHistogram)
    batch_size: FakeHistogram = field(default_factory=FakeHistogram)
    cancel_s: FakeHistogram = field(default_factory=FakeHistogram)
    tokens_per_second: float = 0.0
    heartbeat_age_ms: float = 0.0
    weight_bytes: int = 1000
    kv_bytes: int = 200
    workspace_bytes: int = 30
    failure: str = ""
    failure_code: str = ""

    @property
    def free_blocks(self) -> int:
        return self.total_blocks - self.used_blocks - self.cached_blocks


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def field_bytes(number: int, value: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(value)) + value


def field_varint(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value) if value else b""


def field_double(number: int, value: float) -> bytes:
    return varint(number << 3 | 1) + struct.pack("<d", value)


class FakeJob:
    """`tokens` are the texts it will generate, one a step; ids are their places in that list."""

    def __init__(self, engine: FakeEngine, handle: int, spec: Mapping[str, Any], tokens: Sequence[str]) -> None:
        self.engine = engine
        self.handle = handle
        self.spec = spec
        self.tokens = list(tokens)[: spec["max_tokens"]]
        self.produced = 0
        self.delivered = 0
        self.cancelled = threading.Event()
        self._started_taken = False
        self._outcome: FakeOutcome | None = None
        self._outcome_taken = False
        self.reported = False

    @property
    def num_tokens_out(self) -> int:
        return self.produced

    @property
    def live(self) -> bool:
        return self._outcome is None

    def step(self) -> None:
        if not self.live:
            return
        if self.produced < len(self.tokens):
            self.produced += 1
        if self.produced == len(self.tokens):
            reason = "max_tokens" if self.produced == self.spec["max_tokens"] else "eos"
            self.finish(FakeOutcome(stop_reason=reason, digest=self._digest(self.produced)))
        self.engine.wake(self)

    def finish(self, outcome: FakeOutcome) -> None:
        if not self.live:
            return
        outcome.tokens_in = len(self.spec["prompt_ids"])
        outcome.tokens_out = self.produced
        self._outcome = outcome
        self.engine.wake(self)

    def cancel(self) -> int:
        self.finish(FakeOutcome(error_code="CANCELLED", error_message="the job was cancelled"))
        self.cancelled.set()
        return self.produced

    def take(self) -> tuple[list[bytes], FakeOutcome | None]:
        self.reported = False
        if self._outcome_taken:
            return [], None
        messages = []
        if not self._started_taken:
            self._started_taken = True
            messages.append(field_bytes(1, self._started()))
        while self.delivered < self.produced and not self.cancelled.is_set():
            until = self.delivered + 1 if self.spec["separate_events"] else self.produced
            messages.append(field_bytes(2, self._token(until)))
            self.delivered = until
        outcome = self._outcome
        if outcome is not None:
            self._outcome_taken = True
            messages.append(field_bytes(3, self._metrics(outcome)))
            if not outcome.error_code:
                messages.append(field_bytes(4, self._end(outcome)))
        return messages, outcome

    def _started(self) -> bytes:
        spec = self.spec
        return (
            field_bytes(1, spec["job_id"].encode())
            + field_bytes(2, spec["model"].encode())
            + field_bytes(3, field_varint(1, 1_700_000_000))
            + field_varint(4, spec["seed"])
            + field_varint(5, len(spec["prompt_ids"]))
        )

    def _token(self, until: int) -> bytes:
        text = "".join(self.tokens[self.delivered : until])
        ids = b"".join(varint(i) for i in range(self.delivered, until))
        return (
            field_bytes(1, text.encode())
            + field_varint(2, self.delivered)
            + field_bytes(3, ids)
            + field_bytes(5, self._digest(until)[:16].encode())
        )

    @staticmethod
    def _digest(num_tokens: int) -> str:
        return hashlib.sha256(struct.pack(f"<{num_tokens}I", *range(num_tokens))).hexdigest()

    def _metrics(self, outcome: FakeOutcome) -> bytes:
        return (
            field_varint(1, outcome.tokens_in) + field_varint(2, outcome.tokens_out) + field_double(4, outcome.queue_ms)
        )

    def _end(self, outcome: FakeOutcome) -> bytes:
        reason = {"eos": 1, "max_tokens": 2, "stop_sequence": 3}[outcome.stop_reason]
        return (
            field_varint(1, outcome.tokens_out)
            + field_varint(2, int(outcome.decode_ms))
            + field_varint(3, reason)
            + field_bytes(5, outcome.digest.encode())
        )


class FakeEngine:
    """Jobs advance by `step`, or run to their end at `submit` when `eager`.

    Args:
        tokens: what every job generates.
        eager: produce everything at submission.
    """

    def __init__(self, tokens: Sequence[str] = ("Hello", " world", "!"), *, eager: bool = False) -> None:
        self.tokens = tokens
        self.eager = eager
        self.jobs: list[FakeJob] = []
        self.submit_error: FakeEngineError | None = None
        self.state = FakeStats()
        self.foreign_memory = ""
        self.stopped = False
        self.batch_window_ms = 0
        self.finding = ""
        self.failed_all = threading.Event()
        self.submitted = threading.Semaphore(0)
        self._read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        self._ready: list[int] = []

    @property
    def event_fd(self) -> int:
        return self._read_fd

    def submit(self, **spec: Any) -> FakeJob:
        if self.submit_error is not None:
            raise self.submit_error
        job = FakeJob(self, len(self.jobs) + 1, spec, self.tokens)
        self.jobs.append(job)
        self.wake(job)
        if self.eager:
            while job.live:
                job.step()
        self.submitted.release()
        return job

    def step(self, count: int = 1) -> None:
        """Advances every live job by `count` tokens."""
        for _ in range(count):
            for job in self.jobs:
                job.step()

    def wake(self, job: FakeJob) -> None:
        if not job.reported:
            job.reported = True
            if not self._ready:
                os.write(self._write_fd, b"x")
            self._ready.append(job.handle)

    def take_ready(self) -> list[int]:
        ready, self._ready = self._ready, []
        try:
            os.read(self._read_fd, 4096)
        except BlockingIOError:
            pass  # nobody was woken
        return ready

    def fail_all(self, code: str, message: str) -> int:
        self.failed_all.set()
        live = [job for job in self.jobs if job.live]
        for job in live:
            job.finish(FakeOutcome(error_code=code, error_message=message))
        return len(live)

    def stats(self) -> FakeStats:
        self.state.active_jobs = sum(job.live for job in self.jobs)
        return self.state

    def check_residency(self) -> str:
        return self.foreign_memory

    def audit(self) -> str:
        return self.finding

    def cache_contents(self) -> dict[bytes, tuple[int, int]]:
        return {b"": (self.state.cached_blocks, 0)} if self.state.cached_blocks else {}

    def clear_cache(self) -> int:
        cleared, self.state.cached_blocks = self.state.cached_blocks, 0
        return cleared

    def stop(self) -> None:
        self.fail_all("UNAVAILABLE", "the engine stopped")
        self.stopped = True

    def close(self) -> None:
        """Closes the descriptors; the engine must no longer be attached to a loop."""
        os.close(self._read_fd)
        os.close(self._write_fd)
