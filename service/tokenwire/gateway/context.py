"""What every endpoint needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry

from tokenwire.gateway.asgi import Scope, correlation_id, headers
from tokenwire.gateway.pool import WorkerPool
from tokenwire.gateway.protection import client_certificate
from tokenwire.gateway.worker import Metadata
from tokenwire.http_config import HttpSettings
from tokenwire.observe.logging import get_logger
from tokenwire.rpc.validate import Limits
from tokenwire.security.guard import VOUCHED_KEY, Guard

# Headers that travel on to the worker as they are: who calls, and which trace the call belongs to.
FORWARDED = ("authorization", "x-api-key", "traceparent", "tracestate")


class Gateway:
    """Settings, workers and counts of one gateway.

    Attributes:
        metrics: what the metrics page shows.
        stop: begins the worker's drain, where this gateway is inside it and its operator may ask over HTTP.
        num_unknown_fields: how many body fields with unknown names were ignored so far.
    """

    def __init__(
        self,
        settings: HttpSettings,
        pool: WorkerPool,
        metrics: CollectorRegistry,
        guard: Guard | None = None,
        stop: Callable[[], None] | None = None,
    ) -> None:
        self.settings = settings
        self.pool = pool
        self.metrics = metrics
        self.stop = stop
        self._guard = guard
        self.num_unknown_fields = 0

    @property
    def heartbeat_s(self) -> float:
        return self.settings.http_heartbeat_ms / 1000

    def limits(self) -> Limits | None:
        """The bounds of a request, of a worker that has told them. Workers behind one gateway serve alike; one that
        does not still checks for itself."""
        return next((worker.limits for worker in self.pool.workers if worker.limits is not None), None)

    def metadata(self, scope: Scope) -> Metadata:
        """The gRPC metadata of a request's calls."""
        forwarded = [
            (name, value.strip())
            for name in FORWARDED
            for value in headers(scope, name.encode())
            if value.isascii() and value.isprintable()
        ]
        identity = client_certificate(scope)
        if identity is not None and self._guard is not None:
            forwarded.append((VOUCHED_KEY, self._guard.vouch(identity)))
        return (("x-correlation-id", correlation_id(scope)), *forwarded)

    def count_unknown(self, names: Sequence[str]) -> None:
        if names:
            self.num_unknown_fields += len(names)
            get_logger().debug("unknown_fields_ignored", count=len(names))
