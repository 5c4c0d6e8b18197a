"""Health on a port of its own, answered by a thread of the compiled library.

Probes are answered in microseconds there, however busy the event loop is. What they hear is still the loop's word: it
publishes at every change and a few times a second, and a word that is older than `liveness_seconds` counts no more.
"""

from __future__ import annotations

import asyncio

from tokenwire import _native
from tokenwire.config import Settings
from tokenwire.rpc.listen import listen
from tokenwire.rpc.state import SERVICES, WorkerState

PUBLISH_S = 0.25
# The least that a word is believed, however short `liveness_seconds` is: a busy loop may be late.
LEAST_STALE_S = 2.0


class HealthPort:
    """Serves `grpc.health.v1.Health` without TLS until `close`. Needs a running loop.

    Attributes:
        port: where it listens.

    Raises:
        CannotBindError: the address is in use, or not this machine's.
    """

    def __init__(self, settings: Settings, state: WorkerState, host: str, port: int) -> None:
        sockets = listen(host, port)
        self.port = int(sockets[0].getsockname()[1])
        self._state = state
        self._server = _native.HealthServer(
            listening=[each.detach() for each in sockets],
            services=SERVICES,
            most_streams=settings.max_concurrent_streams,
            most_connections=settings.max_connections,
            most_header_bytes=settings.max_metadata_bytes,
            handshake_timeout_ms=settings.handshake_timeout_ms,
            idle_timeout_ms=settings.max_connection_idle_ms,
            stale_after_ms=int(max(settings.liveness_seconds, LEAST_STALE_S) * 1000),
        )
        self._publish()
        # At once: whoever reads `ready` in the log may ask this port next.
        state.watch(self._publish)
        self._publishing = asyncio.ensure_future(self._keep_publishing())

    async def close(self) -> None:
        """Ends every connection. Idempotent."""
        self._state.unwatch(self._publish)
        self._publishing.cancel()
        await asyncio.gather(self._publishing, return_exceptions=True)
        self._server.stop()

    async def _keep_publishing(self) -> None:
        while True:
            await asyncio.sleep(PUBLISH_S)
            self._publish()

    def _publish(self) -> None:
        self._server.publish([bool(self._state.is_serving(service)) for service in SERVICES])
        for method, code, count in self._server.take_endings():
            self._state.metrics.call_ended(method, code, count)
