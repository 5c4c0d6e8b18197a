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

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 4, 6, 7, 8
ACK = END_STREAM = 1
END_HEADERS = 4
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
        self.socket.sendall(PREFACE + frame(SETTINGS) + frame(WINDOW_UPDATE, b"\x3f\xff\x00\x00"))
        self._next_stream = 1
        self._received = b""
        headers = (
            (":method", "POST"),
            (":scheme", "http"),
            (":path", "/grpc.health.v1.Health/Check"),
            (":authority", f"{host}:{port}"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
        )
        self._headers = b"".join(literal(name, value) for name, value in headers)
        message = REQUEST.SerializeToString()
        self._message = b"\0" + len(message).to_bytes(4, "big") + message
        self._answer = b"\0" + len(SERVING).to_bytes(4, "big") + SERVING

    def send_checks(self, count: int) -> None:
        frames = []
        for _ in range(count):
            frames.append(frame(HEADERS, self._headers, END_HEADERS, self._next_stream))
            frames.append(frame(DATA, self._message, END_STREAM, self._next_stream))
            self._next_stream += 2
        self.socket.sendall(b"".join(frames))

    def receive(self) -> int:
        """Takes what has come; how many checks that answers."""
        received = self.socket.recv(65536)
        if not received:
            raise SystemExit("error: the worker closed the connection")
        self._received += received
        answered = 0
        while len(self._received) >= 9:
            end = 9 + int.from_bytes(self._received[:3], "big")
            if len(self._received) < end:
                break
            kind, flags = self._received[3:5]
            payload, self._received = self._received[9:end], self._received[end:]
            if kind == DATA and payload != self._answer:
                raise SystemExit("error: the worker is not serving")
            if kind == GOAWAY:
                raise SystemExit("error: the worker ends the connection")
            if kind in (SETTINGS, PING) and not flags & ACK:
                self.socket.sendall(frame(kind, payload if kind == PING else b"", ACK))
            answered += kind == HEADERS and bool(flags & END_STREAM)
        return answered


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def literal(name: str, value: str) -> bytes:
    """A header as HPACK takes it without a table; both parts are shorter than 127 bytes."""
    return b"\0" + bytes((len(name),)) + name.encode() + bytes((len(value),)) + value.encode()


if __name__ == "__main__":
    main()
