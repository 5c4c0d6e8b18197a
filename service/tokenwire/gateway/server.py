"""The gateway's life: bind, connect to the workers, serve, stop. Inside the worker's process or on its own."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import socket
from collections.abc import Callable, Generator

import uvicorn
from prometheus_client import CollectorRegistry

from tokenwire.client.auth import ChannelCredentials, channel_credentials
from tokenwire.gateway.app import build_app
from tokenwire.gateway.context import Gateway
from tokenwire.gateway.metrics import UnknownFields, gateway_registry
from tokenwire.gateway.pool import WorkerPool
from tokenwire.gateway.protection import Protection
from tokenwire.gateway.protocol import protocol_class
from tokenwire.http_config import GatewaySettings, HttpSettings
from tokenwire.observe.logging import configure_logging, get_logger
from tokenwire.observe.refusals import RefusalLog
from tokenwire.process import EXIT_CANNOT_BIND, EXIT_CONFIG, EXIT_OK
from tokenwire.security.key_file import KeyFileError
from tokenwire.security.setup import Security, build_gateway_security
from tokenwire.security.tls import TlsError, server_context
from tokenwire.waiting import wait_until

BACKLOG = 512


class GatewayServer:
    """An HTTP server on the running loop.

    Args:
        metrics: what the metrics page shows: the worker's, where this runs inside it; None: the gateway's own.
        security: of the port, and, in a worker's process, of its worker; None: plain text, open to everyone.
        stop: what `POST /shutdown` begins; None: it is refused.

    Attributes:
        port: the one it listens on, once bound.
    """

    def __init__(
        self,
        settings: HttpSettings,
        host: str,
        pool: WorkerPool,
        metrics: CollectorRegistry | None = None,
        security: Security | None = None,
        stop: Callable[[], None] | None = None,
    ) -> None:
        guard = security.guard if security is not None else None
        self.gateway = Gateway(settings, pool, metrics or gateway_registry(pool), guard, stop)
        self.gateway.metrics.register(UnknownFields(lambda: self.gateway.num_unknown_fields))
        self._security = security
        self._refusals = RefusalLog()
        self.port = 0
        self._settings = settings
        self._host = host
        self._socket: socket.socket | None = None
        self._server: _Server | None = None
        self._stopped = False
        self._serving: asyncio.Future[None] | None = None

    def bind(self) -> None:
        """Raises OSError: the address cannot be listened on."""
        host = self._host.strip("[]")
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, self._settings.http_port or 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
        self._socket = bound
        self.port = int(bound.getsockname()[1])

    async def start(self) -> None:
        """Connects to the workers and takes requests, whether they are ready or not."""
        if self._socket is None:
            raise RuntimeError("bind first")
        await self.gateway.pool.start()
        security = self._security
        protection = None
        if security is not None:
            protection = functools.partial(Protection, guard=security.guard, refusals=self._refusals)
        config = uvicorn.Config(
            build_app(self.gateway, protection),
            http=protocol_class(self._settings),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_keep_alive=max(1, self._settings.http_keep_alive_ms // 1000),
            timeout_graceful_shutdown=1,
        )
        if security is not None and security.certificates is not None:
            config.load()
            config.ssl = server_context(security.certificates)
        self._server = _Server(config)
        self._serving = asyncio.ensure_future(self._server.serve(sockets=[self._socket]))

    async def stop(self, grace_s: float) -> None:
        """Takes no new connections, lets running requests end within `grace_s` seconds, and closes. Idempotent."""
        if self._stopped:
            return
        self._stopped = True
        try:
            if self._server is not None and self._serving is not None:
                self._server.config.timeout_graceful_shutdown = max(1, round(grace_s))
                self._server.told_to_stop.set()
                await self._serving
            elif self._socket is not None:
                self._socket.close()
            await self.gateway.pool.close()
        finally:  # a second signal cuts this short
            self._refusals.flush()


class _Server(uvicorn.Server):
    """uvicorn's server without its signals and without its pauses: it stops when it is told to, and then at once."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.told_to_stop = asyncio.Event()

    async def main_loop(self) -> None:
        while not self.told_to_stop.is_set():
            await self.on_tick(0)  # which keeps the date in headers
            await wait_until(self.told_to_stop, 1.0)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        tasks = set(self.server_state.tasks)
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=self.config.timeout_graceful_shutdown)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=1.0)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals belong to the process, which stops this server in its turn."""
        yield


async def run_gateway(settings: GatewaySettings) -> int:
    """A gateway apart, until SIGTERM or SIGINT; a second one cuts its running requests off. Returns the exit status."""
    configure_logging(settings.log_level, settings.log_format)
    log = get_logger()
    stopped, cut_short = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    try:
        security = build_gateway_security(settings)
        credentials = _worker_credentials(settings)
    except (KeyFileError, TlsError, OSError) as error:  # they were right when the settings were read
        log.error("error", code="CONFIG", message=str(error))
        return EXIT_CONFIG
    loop.add_signal_handler(signal.SIGHUP, security.reload)

    def on_signal() -> None:
        (cut_short if stopped.is_set() else stopped).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    server = GatewayServer(settings, settings.host, WorkerPool(settings.targets, credentials), security=security)
    try:
        server.bind()
    except OSError as error:
        log.error("error", code="CANNOT_BIND", message=f"cannot listen on {settings.host}: {error.strerror}")
        return EXIT_CANNOT_BIND
    await server.start()
    workers = len(server.gateway.pool.workers)
    log.info("listening", host=settings.host, http_port=server.port, workers=workers, **security.describe())
    security.warn_if_plain(settings.allow_remote)
    await stopped.wait()
    log.info("drain_start", seconds=settings.drain_seconds)
    stopping = asyncio.ensure_future(server.stop(settings.drain_seconds))
    hurrying = asyncio.ensure_future(cut_short.wait())
    await asyncio.wait([stopping, hurrying], return_when=asyncio.FIRST_COMPLETED)
    hurrying.cancel()
    if not stopping.done():
        stopping.cancel()
        await asyncio.wait([stopping])
    log.info("shutdown")
    return EXIT_OK


def _worker_credentials(settings: GatewaySettings) -> ChannelCredentials | None:
    """Raises OSError: a file cannot be read."""
    if not (settings.target_tls or settings.target_ca_file or settings.target_cert_file):
        return None
    return channel_credentials(
        settings.target_ca_file or None, settings.target_cert_file or None, settings.target_key_file or None
    )
