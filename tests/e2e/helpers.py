"""Requests, their answers as comparable bytes, and engines on tiny models to send them to."""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from tokenwire.v1 import inference_pb2 as pb
from unit.gguf_builder import SPECIAL_TOKENS, byte_characters, tiny_vocabulary

BLOCK_TOKENS = 16
STOP_TOKEN_IDS = (0, 2)
WAIT_S = 60.0


def say(line: str) -> None:
    """Prints a finding; `pytest -s` shows it."""
    sys.stdout.write(f"\n{line}\n")


def only_when_asked(request: pytest.FixtureRequest) -> None:
    """Skips a test that takes minutes, unless `-m` names `slow`."""
    if "slow" not in request.config.getoption("markexpr"):
        pytest.skip("takes minutes; run with -m slow")


@dataclass(frozen=True)
class Request:
    """One generation, as the engine and as `Execute` take it."""

    prompt: tuple[int, ...]
    max_tokens: int
    seed: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int = -1
    stop: tuple[str, ...] = ()
    salt: bytes = b""

    def submit(self, engine: Any, job_id: str, timeout_ms: int = 0) -> Any:
        return engine.submit(
            job_id=job_id,
            model="tiny",
            prompt_ids=self.prompt,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=dict(self.logit_bias),
            logprobs=self.logprobs,
            stop=[stop.encode() for stop in self.stop],
            seed=self.seed,
            timeout_ms=timeout_ms,
            cache_salt=self.salt,
        )

    def message(self, job_id: str) -> pb.ExecuteRequest:
        message = pb.ExecuteRequest(
            job_id=job_id,
            prompt_tokens=pb.TokenIds(ids=self.prompt),
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=dict(self.logit_bias),
            stop=self.stop,
            seed=self.seed,
        )
        if self.logprobs >= 0:
            message.logprobs = self.logprobs
        return message


@dataclass(frozen=True)
class Answer:
    """What must be equal between two runs of a request, bit for bit. Times, and how tokens were grouped, may differ."""

    seed: int
    prompt_tokens: int
    text: str
    ids: tuple[int, ...]
    logprobs: bytes
    end: bytes

    def differences(self, other: Answer) -> list[str]:
        """Names of the fields that differ."""
        return [item.name for item in fields(self) if getattr(self, item.name) != getattr(other, item.name)]

    @property
    def num_bytes(self) -> int:
        return len(self.text.encode()) + 4 * len(self.ids) + len(self.logprobs) + len(self.end)

    @property
    def stop_reason(self) -> int:
        return pb.End.FromString(self.end).stop_reason


class Transcript:
    """Reads the messages of one stream and holds them to the protocol's order."""

    def __init__(self) -> None:
        self.started: pb.Started | None = None
        self.metrics: pb.Metrics | None = None
        self.num_token_events = 0
        self._end: pb.End | None = None
        self._texts: list[str] = []
        self._ids: list[int] = []
        self._logprobs = pb.Token()

    @property
    def num_tokens(self) -> int:
        return len(self._ids)

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(self._ids)

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def add(self, messages: Iterable[bytes]) -> None:
        for message in messages:
            self.add_event(pb.ExecuteEvent.FromString(message))

    def add_event(self, event: pb.ExecuteEvent) -> None:
        kind = event.WhichOneof("event")
        assert self._end is None, f"{kind} after the end"
        # A job that ends in the queue has metrics, but never started.
        assert (self.started is None) == (kind == "started") or kind == "metrics", f"{kind} out of order"
        if kind == "started":
            self.started = event.started
        elif kind == "token":
            token = event.token
            assert self.metrics is None, "a token after the metrics"
            assert token.i == len(self._ids), f"token {token.i} follows {len(self._ids)} tokens"
            self.num_token_events += 1
            self._texts.append(token.t)
            self._ids.extend(token.ids)
            self._logprobs.logprobs.extend(token.logprobs)
        elif kind == "metrics":
            self.metrics = event.metrics
        else:
            assert kind == "end", f"unexpected {kind}: {event}"
            assert self.metrics is not None, "no metrics before the end"
            self._end = event.end

    def answer(self) -> Answer:
        assert self.started is not None
        assert self._end is not None
        end = pb.End()
        end.CopyFrom(self._end)
        end.ClearField("decode_time_ms")
        assert end.tokens_out == len(self._ids)
        return Answer(
            seed=self.started.seed,
            prompt_tokens=self.started.prompt_tokens,
            text=self.text,
            ids=tuple(self._ids),
            logprobs=self._logprobs.SerializeToString(deterministic=True),
            end=end.SerializeToString(deterministic=True),
        )


def tiny_vocabulary_bytes() -> list[bytes]:
    """The bytes of each token of `gguf_builder.tiny_vocabulary`; empty for control tokens."""
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    tokens, _, _ = tiny_vocabulary()
    return [b"" if token in SPECIAL_TOKENS else bytes(byte_of[character] for character in token) for token in tokens]


def make_engine(
    native: Any, path: Path, *, kv_blocks: int = 4096, vocabulary: Sequence[bytes] | None = None, **options: Any
) -> Any:
    """An engine on a model of `gguf_builder`, with a KV pool of `kv_blocks` blocks and further `EngineOptions`."""
    settings = native.EngineOptions()
    file = native.GgufFile(str(path))
    architecture = file.get("general.architecture")
    layers, kv_heads, head = (
        file.get(f"{architecture}.{key}") for key in ("block_count", "attention.head_count_kv", "rope.dimension_count")
    )
    # A key and a value in FP16.
    settings.kv_cache_bytes = kv_blocks * BLOCK_TOKENS * layers * kv_heads * head * 4
    for name, value in options.items():
        assert hasattr(settings, name)
        setattr(settings, name, value)
    words = tiny_vocabulary_bytes() if vocabulary is None else vocabulary
    engine = native.Engine(file, words, STOP_TOKEN_IDS, settings)
    assert engine.stats().total_blocks == kv_blocks
    return engine


def poll_output(engine: Any, timeout_s: float) -> list[int]:
    """Handles of jobs with output; none if the engine does not wake its readers in time."""
    ready, _, _ = select.select([engine.event_fd], [], [], timeout_s)
    handles: list[int] = engine.take_ready() if ready else []
    return handles


def wait_output(engine: Any) -> list[int]:
    """Handles of jobs with output; waits for the engine's wake-up."""
    deadline = time.monotonic() + WAIT_S
    # A wake-up may be for output that an earlier call already reported.
    while not (handles := poll_output(engine, WAIT_S)):
        assert time.monotonic() < deadline, "the engine says nothing"
    return handles


def read_to_end(engine: Any, job: Any, transcript: Transcript | None = None) -> tuple[Transcript, Any]:
    """Takes all of one job, the only one that is read; its transcript and outcome."""
    transcript = Transcript() if transcript is None else transcript
    messages, outcome = job.take()
    transcript.add(messages)
    while outcome is None:
        wait_output(engine)
        messages, outcome = job.take()
        transcript.add(messages)
    return transcript, outcome


def run_alone(engine: Any, request: Request, job_id: str = "alone") -> Answer:
    """The request's answer with nothing else in the engine."""
    transcript, outcome = read_to_end(engine, request.submit(engine, job_id))
    assert outcome.error_code == ""
    return transcript.answer()


def wait_until(what: str, condition: Any, timeout_s: float = 30.0) -> None:
    """Waits for another thread's progress."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.0005)


def settle(engine: Any, timeout_s: float = WAIT_S) -> Any:
    """Waits until no job is left, then holds the ledger to its promise; the stats."""
    deadline = time.monotonic() + timeout_s
    while True:
        assert engine.audit() == ""
        stats = engine.stats()
        if stats.active_jobs == 0 and stats.queued_jobs == 0 and stats.used_blocks == 0:
            assert stats.free_blocks + stats.cached_blocks == stats.total_blocks
            return stats
        assert time.monotonic() < deadline, f"{stats.active_jobs} active, {stats.used_blocks} blocks used"
        time.sleep(0.001)
