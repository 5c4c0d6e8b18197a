"""A worker process for tests that need the whole of it."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

START_TIMEOUT_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class WorkerProcess:
    """`tokenwire serve` on a port that it keeps, for tests that kill it."""

    def __init__(self, model: Path, port: int, *flags: str) -> None:
        self.target = f"127.0.0.1:{port}"
        self._command = (sys.executable, "-m", "tokenwire", "serve", "--model", str(model), "--port", str(port), *flags)

    def __enter__(self) -> WorkerProcess:
        self._start()
        wait_until_ready(self._process, self.target)
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()

    def kill_and_start_again(self) -> None:
        """`kill -9`; does not wait until the new process is ready."""
        self._process.kill()
        self._process.wait()
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@contextmanager
def running_worker(model: Path, *flags: str) -> Iterator[str]:
    """Runs `tokenwire serve` on a free loopback port; yields its address once it is ready, and stops it afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    target = f"127.0.0.1:{port}"
    command = [sys.executable, "-m", "tokenwire", "serve", "--model", str(model), "--port", str(port), *flags]
    worker = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until_ready(worker, target)
        yield target
        worker.terminate()
        assert worker.wait(60) == 0
    finally:
        worker.kill()
        worker.wait()


def wait_until_ready(worker: subprocess.Popen[bytes], target: str) -> None:
    give_up_at = time.monotonic() + START_TIMEOUT_S
    with grpc.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while time.monotonic() < give_up_at:
            assert worker.poll() is None, "the worker ended"
            try:
                request = health_pb2.HealthCheckRequest(service="readiness")
                if stub.Check(request, timeout=1, wait_for_ready=True).status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError:
                pass
            time.sleep(0.05)
    raise AssertionError("the worker was not ready in time")
