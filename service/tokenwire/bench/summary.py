"""From the records of a run to its figures. docs/benchmarks.md says how each is defined."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tokenwire.bench.load import Arrival, Record


@dataclass(frozen=True)
class Distribution:
    """Of a set of values. A percentile that fewer values than 1 / (1 − q) would have to carry is None, not a guess."""

    count: int
    mean: float
    least: float
    p50: float
    p95: float | None
    p99: float | None
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Distribution | None:
        """None for no values."""
        ordered = sorted(values)
        if not ordered:
            return None
        return cls(
            count=len(ordered),
            mean=statistics.fmean(ordered),
            least=ordered[0],
            p50=percentile(ordered, 0.5),
            p95=percentile(ordered, 0.95) if len(ordered) >= 20 else None,
            p99=percentile(ordered, 0.99) if len(ordered) >= 100 else None,
            most=ordered[-1],
        )


@dataclass(frozen=True)
class Summary:
    """A run's figures; times in milliseconds unless named otherwise, None where nothing was measured.

    Attributes:
        duration_s: from the first request due to the end of the last stream.
        completed, errors: requests that ended well, and how many failed by code.
        stop_reasons: of the completed ones.
        prompt_tokens, cached_tokens, tokens_out: sums over the completed ones.
        tokens_per_second: `tokens_out` over `duration_s`, with the run's start and tail.
        ttft_ms: from due to the first token.
        itl_ms: between tokens; the tokens of one event share the time since the event before it.
        event_gap_ms: between events, as a reader sees them.
        latency_ms: from due to the stream's end.
        queue_ms: as the server reports it.
        send_lag_ms: from due to sent: how far the load generator itself fell behind.
    """

    duration_s: float
    completed: int
    errors: Mapping[str, int]
    stop_reasons: Mapping[str, int]
    prompt_tokens: int
    cached_tokens: int
    tokens_out: int
    tokens_per_second: float
    requests_per_second: float
    tokens_per_event: float | None
    ttft_ms: Distribution | None
    itl_ms: Distribution | None
    event_gap_ms: Distribution | None
    latency_ms: Distribution | None
    queue_ms: Distribution | None
    send_lag_ms: Distribution | None

    @classmethod
    def of(cls, records: Sequence[Record]) -> Summary:
        """Of at least one record. Failed requests count as errors and for the duration, and nowhere else."""
        done = [record for record in records if not record.answer.error_code]
        duration_s = max(record.ended_s for record in records) - min(record.due_s for record in records)
        tokens_out = sum(record.answer.num_tokens for record in done)
        num_events = sum(len(record.answer.arrivals) for record in done)
        return cls(
            duration_s=duration_s,
            completed=len(done),
            errors=dict(Counter(record.answer.error_code for record in records if record.answer.error_code)),
            stop_reasons=dict(Counter(record.answer.stop_reason for record in done)),
            prompt_tokens=sum(record.answer.prompt_tokens for record in done),
            cached_tokens=sum(record.answer.cached_tokens for record in done),
            tokens_out=tokens_out,
            tokens_per_second=tokens_out / duration_s if duration_s > 0 else 0.0,
            requests_per_second=len(done) / duration_s if duration_s > 0 else 0.0,
            tokens_per_event=tokens_out / num_events if num_events else None,
            ttft_ms=Distribution.of(
                (record.answer.arrivals[0].at_s - record.due_s) * 1000 for record in done if record.answer.arrivals
            ),
            itl_ms=Distribution.of(ms for record in done for ms in token_gaps_ms(record.answer.arrivals)),
            event_gap_ms=Distribution.of(ms for record in done for ms in event_gaps_ms(record.answer.arrivals)),
            latency_ms=Distribution.of((record.ended_s - record.due_s) * 1000 for record in done),
            queue_ms=Distribution.of(record.answer.queue_ms for record in done if record.answer.queue_ms is not None),
            send_lag_ms=Distribution.of((record.sent_s - record.due_s) * 1000 for record in records),
        )


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` (0–1) of them lie, between neighbours by linear interpolation.

    Args:
        ordered: at least one value, ascending.
    """
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def event_gaps_ms(arrivals: Sequence[Arrival]) -> list[float]:
    """Milliseconds between successive events."""
    return [(later.at_s - earlier.at_s) * 1000 for earlier, later in pairwise(arrivals)]


def token_gaps_ms(arrivals: Sequence[Arrival]) -> list[float]:
    """Milliseconds a token: an event of n tokens gives n equal parts of the time since the event before it.

    The first event gives none: what came with the first token has no earlier event to count from.
    """
    return [
        gap_ms / arrival.num_tokens
        for gap_ms, arrival in zip(event_gaps_ms(arrivals), arrivals[1:], strict=True)
        for _ in range(arrival.num_tokens)
    ]
