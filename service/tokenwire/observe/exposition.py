"""Metrics over HTTP: a page for whoever has a server already, and a small server for a worker that speaks only gRPC."""

from __future__ import annotations

import socket
import socketserver
import threading
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

# A scrape takes milliseconds and there are few scrapers; who sends nothing must not hold a thread for ever.
MAX_CONNECTIONS = 16
TIMEOUT_S = 10.0


def render(registry: CollectorRegistry, accept: str = "") -> tuple[bytes, str]:
    """The page and its content type, in the format that the `Accept` header asks for."""
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class MetricsServer:
    """Serves the page at every path, from threads of its own, until `close`.

    Raises:
        OSError: the address cannot be bound.
    """

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        self._server = _BoundedServer((host, port), type("_Handler", (_Handler,), {"registry": registry}))
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(prometheus_client.MetricsHandler):
    timeout = TIMEOUT_S


class _BoundedServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], handler: Any) -> None:
        self.address_family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A scraper that leaves is no event of ours."""
