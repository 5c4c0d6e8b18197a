"""What is written down of a job: its lines in the log, its metrics, its trace. Counts, hashes and times, never text."""

from __future__ import annotations

import array
import hashlib
import time
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from tokenwire.engine import JobSpec, JobStream
from tokenwire.observe import tracing
from tokenwire.observe.logging import get_logger
from tokenwire.rpc.boundary import Context
from tokenwire.rpc.state import WorkerState


@dataclass(frozen=True, slots=True)
class _Begun:
    """What a trace needs from the beginning of a job; `submitted_ms` since its arrival."""

    carrier: dict[str, str]
    spec: JobSpec
    submitted_ms: float


class JobObserver:
    """Belongs to the event loop's thread."""

    def __init__(self, state: WorkerState) -> None:
        self._state = state
        # Of the jobs that are traced.
        self._begun: WeakKeyDictionary[JobStream, _Begun] = WeakKeyDictionary()

    def started(self, stream: JobStream, spec: JobSpec, arrived: float, context: Context) -> None:
        """A job was submitted.

        Args:
            arrived: when its call did, by `time.monotonic`.
        """
        digest = hashlib.sha256(array.array("I", spec.prompt_ids).tobytes()).hexdigest()
        get_logger().info(
            "execute_start",
            tokens_in=len(spec.prompt_ids),
            max_tokens=spec.max_tokens,
            seed=spec.seed,
            prompt_sha256=digest,
        )
        if self._state.tracer is not None:
            carrier = tracing.carrier_of(context.invocation_metadata())
            self._begun[stream] = _Begun(carrier, spec, (time.monotonic() - arrived) * 1000)

    def ended(self, stream: JobStream, ending: str, wall_s: float) -> None:
        """A job has ended, by `OK`, an error's code or DISCONNECTED, `wall_s` after its call arrived."""
        _log_end(stream, ending, wall_s)
        outcome = stream.outcome
        first_token_ms = outcome.first_token_ms if outcome is not None else 0.0
        self._state.metrics.job_ended(
            ending,
            wall_s,
            first_token_ms / 1000 if first_token_ms > 0 else None,
            outcome.cached_tokens if outcome is not None else 0,
        )
        begun = self._begun.pop(stream, None)
        if begun is not None and self._state.tracer is not None:
            self._state.tracer.job_ended(_trace(stream, begun, ending, wall_s * 1000))


def _log_end(stream: JobStream, ending: str, wall_s: float) -> None:
    fields: dict[str, object] = {"outcome": ending, "tokens_out": stream.tokens_out, "wall_ms": round(wall_s * 1000, 1)}
    outcome = stream.outcome
    if outcome is not None:
        fields.update(
            stop_reason=outcome.stop_reason,
            tokens_in=outcome.tokens_in,
            cached_tokens=outcome.cached_tokens,
            queue_ms=round(outcome.queue_ms, 3),
            prefill_ms=round(outcome.prefill_ms, 3),
            first_token_ms=round(outcome.first_token_ms, 3),
            decode_ms=round(outcome.decode_ms, 3),
            output_sha256=outcome.digest,
        )
    get_logger().info("execute_end", **fields)


def _trace(stream: JobStream, begun: _Begun, ending: str, wall_ms: float) -> tracing.JobTrace:
    spec, outcome = begun.spec, stream.outcome
    times = tracing.JobTimes(wall_ms, begun.submitted_ms)
    cached = 0
    if outcome is not None:
        cached = outcome.cached_tokens
        times = tracing.JobTimes(
            wall_ms,
            begun.submitted_ms,
            outcome.queue_ms,
            outcome.prefill_ms,
            outcome.decode_ms,
            outcome.first_token_ms,
            outcome.cache_lookup_ms,
        )
    return tracing.JobTrace(
        carrier=begun.carrier,
        attributes={
            tracing.REQUEST_MODEL: spec.model,
            tracing.RESPONSE_MODEL: spec.model,
            tracing.RESPONSE_ID: spec.job_id,
            tracing.REQUEST_MAX_TOKENS: spec.max_tokens,
            tracing.REQUEST_TEMPERATURE: spec.temperature,
            tracing.REQUEST_TOP_P: spec.top_p,
            tracing.REQUEST_TOP_K: spec.top_k,
            # An attribute is a signed number; a seed may be larger.
            tracing.REQUEST_SEED: spec.seed if spec.seed < 2**63 else str(spec.seed),
        },
        times=times,
        code=ending,
        stop_reason=outcome.stop_reason if outcome is not None else "",
        admitted=outcome is not None and outcome.prefill_ms > 0,
        tokens=(len(spec.prompt_ids), cached, stream.tokens_out),
    )
