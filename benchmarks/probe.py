"""Health checks from a process of its own: `python -m benchmarks.probe HOST:PORT` prints the milliseconds of each.

The frames of HTTP/2 are made by hand, so that a check costs this process microseconds: what is measured is the worker
and the machine's scheduler, not a client library. `--grpcio` probes with one, as a program in Python would.
"""

from __future__ import annotations

import argparse
import json
import selectors
import socket
import sys
import time
from collections.abc import Callable, Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks import h2

TIMEOUT_S = 20.0
REQUEST = health_pb2.HealthCheckRequest(service="readiness")
SERVING = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING).SerializeToString()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--parallel", type=int, default=1, help="checks sent at once, in each round")
    parser.add_argument("--interval-ms", type=float, default=20.0, help="between two rounds")
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--grpcio", action="store_true")
    args = parser.parse_args(arguments)
    checks = grpcio(args.target) if args.grpcio else Connections(args.target, args.connections).check
    took_ms: list[float] = []
    for number in range(args.rounds + 5):
        if number == 5:  # the first ones set the connections up
            took_ms.clear()
        took_ms += checks(args.parallel)
        time.sleep(args.interval_ms / 1000)
    json.dump(took_ms, sys.stdout)


def grpcio(target: str) -> Callable[[int], list[float]]:
    stub = health_pb2_grpc.HealthStub(grpc.insecure_channel(target))

    def check(parallel: int) -> list[float]:
        if parallel != 1:
            raise SystemExit("error: --grpcio probes one at a time")
        began = time.perf_counter()
        if stub.Check(REQUEST, timeout=TIMEOUT_S).SerializeToString() != SERVING:
            raise SystemExit("error: the worker is not serving")
        return [(time.perf_counter() - began) * 1000]

    return check


class Connections:
    """Plain connections of HTTP/2 to one worker."""

    def __init__(self, target: str, count: int) -> None:
        host, _, port = target.rpartition(":")
        self._selector = selectors.DefaultSelector()
        self._open = [Connection(host, int(port)) for _ in range(count)]
        for connection in self._open:
            self._selector.register(connection.socket, selectors.EVENT_READ, connection)

    def check(self, parallel: int) -> list[float]:
        """Sends so many checks at once, spread over the connections; milliseconds of each."""
        waiting, took_ms = 0, []
        began = time.perf_counter()
        for number, connection in enumerate(self._open):
            share = len(range(number, parallel, len(self._open)))
            connection.send_checks(share)
            waiting += share
        while waiting:
            ready = self._selector.select(TIMEOUT_S)
            if not ready:
                raise SystemExit(f"error: {waiting} checks were not answered within {TIMEOUT_S:g} s")
            for key, _ in ready:
                answered = key.data.receive()
                took_ms += [(time.perf_counter() - began) * 1000] * answered
                waiting -= answered
        return took_ms


class Connection:
    def __init__(self, host: str, port: int) -> None:
        self.socket = socket.create_connection((host, port), TIMEOUT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(h2.opening())
        self._next_stream = 1
        self._received = bytearray()
        self._headers = h2.call_headers(f"{host}:{port}", "/grpc.health.v1.Health/Check")
        self._message = REQUEST.SerializeToString()
        self._answer = b"\0" + len(SERVING).to_bytes(4, "big") + SERVING

    def send_checks(self, count: int) -> None:
        calls = []
        for _ in range(count):
            calls.append(h2.call(self._headers, self._message, self._next_stream))
            self._next_stream += 2
        self.socket.sendall(b"".join(calls))

    def receive(self) -> int:
        """Takes what has come; how many checks that answers."""
        received = self.socket.recv(65536)
        if not received:
            raise SystemExit("error: the worker closed the connection")
        self._received += received
        answered = 0
        for kind, flags, _, payload in h2.frames(self._received):
            if kind == h2.DATA and payload != self._answer:
                raise SystemExit("error: the worker is not serving")
            if kind == h2.GOAWAY:
                raise SystemExit("error: the worker ends the connection")
            if answer := h2.answer_to(kind, flags, payload):
                self.socket.sendall(answer)
            answered += kind == h2.HEADERS and bool(flags & h2.END_STREAM)
        return answered


if __name__ == "__main__":
    main()
