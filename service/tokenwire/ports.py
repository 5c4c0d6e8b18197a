"""What a worker listens on: gRPC, HTTP, metrics, and health and administration on ports of their own."""

from __future__ import annotations

import asyncio
import tempfile
from typing import TYPE_CHECKING

import grpc

from tokenwire.config import Settings
from tokenwire.observe.exposition import MetricsServer
from tokenwire.rpc.admin import Control
from tokenwire.rpc.credentials import server_credentials
from tokenwire.rpc.listen import CannotBindError, bind, shown_address
from tokenwire.rpc.server import build_admin_server
from tokenwire.rpc.state import WorkerState
from tokenwire.security.setup import Security

if TYPE_CHECKING:
    from tokenwire.gateway.server import GatewayServer
    from tokenwire.health_port import HealthPort


class Ports:
    """The open ports by purpose; closed in reverse. Whatever cannot be opened raises CannotBindError."""

    def __init__(self, settings: Settings, security: Security) -> None:
        self._settings = settings
        self._security = security
        self._open: dict[str, int] = {}
        self._servers: list[grpc.aio.Server | MetricsServer] = []
        self._gateway: GatewayServer | None = None
        self._health: HealthPort | None = None
        self._inner: tempfile.TemporaryDirectory[str] | None = None
        self._inner_target = ""

    async def open_grpc(self, purpose: str, server: grpc.aio.Server, host: str, port: int) -> int:
        """Binds and starts a server; returns its port."""
        self._servers.append(server)
        certificates = self._security.certificates
        credentials = server_credentials(certificates) if certificates is not None else None
        if purpose == "grpc" and credentials is not None and self._settings.http_port is not None:
            self._open_inner(server)
        self._open[purpose] = bind(server, host, port, credentials)
        await server.start()
        return self._open[purpose]

    def open_probes(self, state: WorkerState) -> None:
        """Metrics and health, each where a port was asked for."""
        host = self._settings.probe_host or self._settings.host
        if self._settings.metrics_port is not None:
            self._open_metrics(state, host, self._settings.metrics_port)
        if self._settings.health_port is not None:
            # Here, not above: a worker without this port needs the compiled library for its model alone.
            from tokenwire.health_port import HealthPort

            self._health = HealthPort(self._settings, state, host, self._settings.health_port)
            self._open["health"] = self._health.port

    async def open_admin(self, state: WorkerState, control: Control) -> None:
        """The AdminService, where a port was asked for."""
        if self._settings.admin_port is not None:
            server = build_admin_server(self._settings, state, control, self._security.guard)
            await self.open_grpc("admin", server, self._settings.admin_host, self._settings.admin_port)

    async def open_http(self, grpc_port: int, state: WorkerState, control: Control) -> None:
        """The HTTP gateway, where one is wanted. It reaches this worker as any other client does."""
        if self._settings.http_port is None:
            return
        # Here, not above: a worker without HTTP starts faster without it.
        from tokenwire.gateway.pool import WorkerPool
        from tokenwire.gateway.server import GatewayServer

        host = self._settings.host.strip("[]")
        near = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
        target = self._inner_target or shown_address(near, grpc_port)
        metrics = state.metrics.registry
        asks_for_keys = not self._security.guard.is_open
        stop = control.stop if asks_for_keys or self._settings.admin_port is not None else None
        gateway = GatewayServer(self._settings, host, WorkerPool([target]), metrics, self._security, stop)
        try:
            gateway.bind()
        except OSError as error:
            shown = shown_address(host, self._settings.http_port)
            raise CannotBindError(f"cannot listen on {shown}: {error.strerror}") from error
        self._gateway = gateway
        await gateway.start()
        self._open["http"] = gateway.port

    async def close_http(self, grace_s: float) -> None:
        """Lets answers that are complete leave, and closes the gateway. Idempotent."""
        if self._gateway is not None:
            await self._gateway.stop(grace_s)

    def others(self) -> dict[str, int]:
        """The ports beside the main one, for the log."""
        return {f"{purpose}_port": port for purpose, port in self._open.items() if purpose != "grpc"}

    async def close(self) -> None:
        await self.close_http(0)
        for server in reversed(self._servers):
            if isinstance(server, MetricsServer):
                await asyncio.get_running_loop().run_in_executor(None, server.close)
            else:
                await server.stop(None)
        if self._health is not None:
            await self._health.close()
        if self._inner is not None:
            self._inner.cleanup()

    def _open_inner(self, server: grpc.aio.Server) -> None:
        """Another way to the same server, for the gateway of this process: what is inside needs no TLS, and a
        certificate would have to name the loopback address."""
        self._inner = tempfile.TemporaryDirectory(prefix="tokenwire-")  # which nobody else may enter
        target = f"unix:{self._inner.name}/worker"
        server.add_insecure_port(target)
        self._inner_target = target

    def _open_metrics(self, state: WorkerState, host: str, port: int) -> None:
        try:
            server = MetricsServer(state.metrics.registry, host.strip("[]"), port)
        except OSError as error:
            raise CannotBindError(f"cannot listen on {shown_address(host, port)}: {error.strerror}") from error
        self._servers.append(server)
        self._open["metrics"] = server.port
