"""A TCP proxy that cuts its connections: what a network does to a stream, at a byte of the test's choice."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Iterable, Iterator

CHUNK = 4096
# Closing with this set sends a reset, as a crash or a firewall does, instead of an orderly end.
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class BreakingProxy:
    """Passes bytes on to a target. The n-th connection is cut once it carried `cuts[n]` bytes to the client.

    Attributes:
        num_connections: accepted so far.
        num_cut: of those, how many were cut before they ended by themselves.
    """

    def __init__(self, target_port: int, cuts: Iterable[int]) -> None:
        self.port = 0
        self.num_connections = 0
        self.num_cut = 0
        self._target_port = target_port
        self._cuts: Iterator[int] = iter(cuts)
        self._open: set[asyncio.StreamWriter] = set()

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def cut_all(self) -> None:
        """Cuts what is open now."""
        for writer in list(self._open):
            self.num_cut += 1
            self._reset(writer)

    async def serve(self, client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        left = next(self._cuts, None)
        self._open.add(client_out)
        try:
            worker_in, worker_out = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            self._reset(client_out)
            return
        up = asyncio.ensure_future(self._pass_on(client_in, worker_out))
        try:
            while data := await worker_in.read(CHUNK):
                if left is not None:
                    data, left = data[:left], left - len(data)
                client_out.write(data)
                await client_out.drain()
                if left is not None and left <= 0:
                    self.num_cut += 1
                    break
        except OSError:
            pass  # one side left
        finally:
            up.cancel()
            self._reset(client_out)
            self._reset(worker_out)

    @staticmethod
    async def _pass_on(client_in: asyncio.StreamReader, worker_out: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await client_in.read(CHUNK):
                worker_out.write(data)
                await worker_out.drain()
        worker_out.close()

    def _reset(self, writer: asyncio.StreamWriter) -> None:
        self._open.discard(writer)
        if not writer.is_closing():
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            writer.transport.abort()


@contextlib.asynccontextmanager
async def breaking_proxy(target_port: int, cuts: Iterable[int] = ()) -> AsyncIterator[BreakingProxy]:
    proxy = BreakingProxy(target_port, cuts)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        proxy.cut_all()
        await server.wait_closed()
