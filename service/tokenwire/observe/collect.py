"""Fills the metrics of `observe/metrics.py`: requests are counted where they end, all else is read when scraped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from tokenwire._version import __version__
from tokenwire.observe import metrics as declared
from tokenwire.observe.log_file import num_lines_dropped
from tokenwire.observe.metrics import Declaration
from tokenwire.stats import EngineStats, Histogram

# A series beside each counter that says when it began: twice the page for nothing that is asked here.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]

_CANCELLED_CODES = frozenset({"CANCELLED", declared.DISCONNECTED, "INFERENCE_TIMEOUT"})


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The worker at the moment of a scrape. `engine` is None until the model is loaded."""

    phase: str
    ready: bool
    load_percent: int
    uptime_s: float
    model: str
    device: str
    quant_kind: str
    engine: EngineStats | None
    detached_jobs: int = 0
    detached_bytes: int = 0


class WorkerMetrics:
    """All metrics of one worker, in a registry of its own.

    Args:
        snapshot: the worker as it is now; called at every scrape, from any thread.
    """

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self._requests = self._counter(declared.REQUEST_TOTAL)
        self._durations = self._histogram(declared.REQUEST_DURATION)
        self._first_tokens = self._histogram(declared.TIME_TO_FIRST_TOKEN)
        self._swaps = self._histogram(declared.MODEL_SWAP)
        self._persists = self._histogram(declared.CACHE_PERSIST)
        # Series that exist from the start let a rate see their first increase.
        for code in declared.CODES:
            self._requests.labels("Execute", code)
        for histogram in (self._durations, self._first_tokens, self._swaps):
            for values in next(d for d in declared.DECLARATIONS if d.name == histogram._name).labels.values():
                for value in values:
                    histogram.labels(value)
        self.registry.register(_ScrapeCollector(snapshot))
        prometheus_client.ProcessCollector(registry=self.registry)

    def call_ended(self, method: str, code: str, count: int = 1) -> None:
        """Counts calls of a method, by its short name, that ended with `OK`, an error's code or DISCONNECTED."""
        known = method if method in declared.METHODS else declared.OTHER_METHOD
        self._requests.labels(known, code if code in declared.CODES else "INTERNAL").inc(count)

    def job_ended(self, code: str, seconds: float, first_token_s: float | None, cached_tokens: int) -> None:
        """Observes a job.

        Args:
            code: as for `call_ended`.
            seconds: from the arrival of its call to the end of its stream.
            first_token_s: from submission to the first token; None if there was none.
        """
        outcome = "ok" if code == declared.OK else "cancelled" if code in _CANCELLED_CODES else "error"
        self._durations.labels(outcome).observe(seconds)
        if first_token_s is not None:
            self._first_tokens.labels("warm" if cached_tokens else "cold").observe(first_token_s)

    def _counter(self, item: Declaration) -> prometheus_client.Counter:
        return prometheus_client.Counter(item.name, item.help, tuple(item.labels), registry=self.registry)

    def _histogram(self, item: Declaration) -> prometheus_client.Histogram:
        return prometheus_client.Histogram(
            item.name, item.help, tuple(item.labels), buckets=item.buckets, registry=self.registry
        )


class _ScrapeCollector(Collector):
    """What is true when somebody asks."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        now = self._snapshot()
        yield _gauge(declared.UPTIME, now.uptime_s)
        yield _gauges(declared.PHASE, {(phase,): float(phase == now.phase) for phase in declared.PHASES})
        yield _gauge(declared.READY, float(now.ready))
        yield _gauge(declared.LOAD, now.load_percent / 100)
        yield _gauges(declared.INFO, {(__version__, now.model, now.device, now.quant_kind): 1.0})
        yield _gauge(declared.AGENTS_ACTIVE, 0.0)
        yield _gauge(declared.DETACHED_JOBS, now.detached_jobs)
        yield _gauge(declared.DETACHED_BYTES, now.detached_bytes)
        yield _counter(declared.LOG_LINES_DROPPED, num_lines_dropped())
        if now.engine is not None:
            yield from _engine_metrics(now.engine, now.device)
            yield from _aliases(now.engine, now.model)


def _engine_metrics(engine: EngineStats, device: str) -> Iterable[Metric]:
    yield _gauge(declared.QUEUE_DEPTH, engine.queued_jobs)
    yield _gauge(declared.REQUESTS_ACTIVE, engine.active_jobs)
    yield _gauge(declared.POOL_UTILIZATION, _utilization(engine))
    blocks = {"free": engine.free_blocks, "used": engine.used_blocks, "cached": engine.cached_blocks}
    yield _gauges(declared.KV_BLOCKS, {(state,): float(count) for state, count in blocks.items()})
    memory = {"weights": engine.weight_bytes, "kv": engine.kv_bytes, "workspace": engine.workspace_bytes}
    yield _gauges(declared.MEMORY_USED, {(kind,): float(size) for kind, size in memory.items()})
    yield _gauge(declared.VRAM, 0.0 if device == "cpu" else float(sum(memory.values())))
    yield _gauge(declared.TOKENS_PER_SECOND, engine.tokens_per_second)
    yield _counter(declared.TOKENS_GENERATED, engine.num_generated_tokens)
    computed = engine.num_prompt_tokens - engine.num_cached_tokens
    yield _counters(declared.PROMPT_TOKENS, {"computed": computed, "cached": engine.num_cached_tokens})
    yield _counters(declared.CACHE_HIT, {"device": engine.num_cache_hits})
    yield _counter(declared.CACHE_MISS, engine.num_cache_misses)
    yield _counters(declared.EVICTION, {"device": engine.num_evictions})
    yield _counter(declared.PREEMPTION, engine.num_preemptions)
    yield _histogram(declared.INTER_TOKEN_LATENCY, engine.inter_token_s)
    yield _histogram(declared.BATCH_SIZE, engine.batch_size)
    yield _histogram(declared.CANCEL_LATENCY, engine.cancel_s)


def _aliases(engine: EngineStats, model: str) -> Iterable[Metric]:
    yield _gauges(declared.VLLM_WAITING, {(model,): float(engine.queued_jobs)})
    yield _gauges(declared.VLLM_RUNNING, {(model,): float(engine.active_jobs)})
    yield _gauges(declared.VLLM_KV_USAGE, {(model,): _utilization(engine)})
    yield _gauges(declared.VLLM_CACHE_CONFIG, {(model, str(engine.block_tokens), str(engine.total_blocks)): 1.0})
    yield _gauges(declared.VLLM_LORA, {("0", "", ""): time.time()})


def _utilization(engine: EngineStats) -> float:
    return engine.used_blocks / engine.total_blocks if engine.total_blocks else 0.0


def _gauge(item: Declaration, value: float) -> Metric:
    return GaugeMetricFamily(item.name, item.help, value=value)


def _gauges(item: Declaration, values: dict[tuple[str, ...], float]) -> Metric:
    family = GaugeMetricFamily(item.name, item.help, labels=tuple(item.labels))
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family


def _counter(item: Declaration, value: float) -> Metric:
    return CounterMetricFamily(item.name, item.help, value=value)


def _counters(item: Declaration, values: dict[str, int]) -> Metric:
    family = CounterMetricFamily(item.name, item.help, labels=tuple(item.labels))
    for label, value in values.items():
        family.add_metric((label,), value)
    return family


def _histogram(item: Declaration, histogram: Histogram) -> Metric:
    buckets, total = [], 0
    for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound == float("inf") else f"{bound:g}", float(total)))
    return HistogramMetricFamily(item.name, item.help, buckets=buckets, sum_value=histogram.sum)
