"""The metrics page: a worker's own metrics where the gateway runs inside it, the gateway's where it runs apart."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import prometheus_client
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tokenwire.gateway.asgi import Receive, Scope, Send, header, respond
from tokenwire.gateway.pool import WorkerPool
from tokenwire.observe import metrics as declared
from tokenwire.observe.exposition import render


class MetricsPage:
    """Answers in the format that `Accept` asks for. Rendered in a thread: streams do not wait for a scrape."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        accept = header(scope, b"accept")
        loop = asyncio.get_running_loop()
        page, content_type = await loop.run_in_executor(None, render, self._registry, accept)
        await respond(send, 200, page, content_type, extra={"cache-control": "no-store"})


def gateway_registry(pool: WorkerPool) -> CollectorRegistry:
    """What a gateway apart can say: of its process, and of the workers behind it. Their own metrics are theirs."""
    registry = CollectorRegistry()
    registry.register(_Workers(pool))
    prometheus_client.ProcessCollector(registry=registry)
    return registry


class UnknownFields(Collector):
    """How many fields of unknown names a gateway ignored.

    Args:
        count: the number so far.
    """

    def __init__(self, count: Callable[[], int]) -> None:
        self._count = count

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        declaration = declared.GATEWAY_UNKNOWN_FIELDS
        yield CounterMetricFamily(declaration.name, declaration.help, value=self._count())


class _Workers(Collector):
    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        counts = dict.fromkeys(declared.GATEWAY_WORKERS.labels["state"], 0)
        for worker in tuple(self._pool.workers):
            counts["ready" if worker.ready else "not_ready" if worker.report is not None else "unreachable"] += 1
        family = GaugeMetricFamily(
            declared.GATEWAY_WORKERS.name, declared.GATEWAY_WORKERS.help, labels=tuple(declared.GATEWAY_WORKERS.labels)
        )
        for state, count in counts.items():
            family.add_metric((state,), count)
        yield family
