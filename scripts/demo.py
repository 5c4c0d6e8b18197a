"""Serves a real model on this machine and streams a haiku from it over gRPC: what `make demo` runs.

The model is fetched on the first run. The worker listens on a free loopback port and is stopped at the end, whatever
the end is.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

PROMPT = "Write a haiku about GPU computing"
# A seed makes the demo show the same poem every time; another one gives another.
SAMPLING = ("--max-tokens", "64", "--temperature", "0.7", "--top-p", "0.9", "--seed", "8")
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 45.0
TOKENWIRE = [sys.executable, "-m", "tokenwire"]


class DemoError(Exception):
    """The demo cannot go on; the message is one line for a person."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Stream a haiku from a model served on this machine.")
    parser.add_argument("--model", default="smollm2", help="what `tokenwire pull` takes")
    parser.add_argument("--prompt", default=PROMPT)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        path = pull(arguments.model)
        with serve(path) as target:
            say(f'asking for: "{arguments.prompt}"\n')
            # The answer goes to this terminal as it comes; the summary follows on stderr.
            command = [*TOKENWIRE, "generate", arguments.prompt, "--target", target, *SAMPLING]
            return subprocess.run(command, check=False).returncode
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def pull(model: str) -> str:
    """Fetches the model if it is not there yet; returns the file's path."""
    result = subprocess.run([*TOKENWIRE, "pull", model], stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode != 0:
        raise DemoError(f"the model {model} could not be fetched; the reason is above")
    return result.stdout.splitlines()[-1]


@contextlib.contextmanager
def serve(model: str) -> Iterator[str]:
    """A worker in the background; yields its address once it is ready and stops it afterwards."""
    with tempfile.TemporaryDirectory(prefix="tokenwire-demo-") as directory:
        log = Path(directory) / "worker.log"
        port = free_port()
        target = f"127.0.0.1:{port}"
        command = [*TOKENWIRE, "serve", "--model", model, "--port", str(port), "--log-format", "json"]
        begun_at = time.monotonic()
        with log.open("wb") as output:
            worker = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            wait_until_ready(worker, target, log)
            say(f"worker ready at {target} after {time.monotonic() - begun_at:.1f} s")
            yield target
        finally:
            stop(worker)


def wait_until_ready(worker: subprocess.Popen[bytes], target: str, log: Path) -> None:
    """Waits for `readiness` of grpc.health.v1.

    Raises:
        DemoError: the worker ended, or was not ready in time; the end of its log is part of the message.
    """
    give_up_at = time.monotonic() + START_TIMEOUT_S
    with grpc.insecure_channel(target, [("grpc.enable_http_proxy", 0)]) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        while time.monotonic() < give_up_at:
            if worker.poll() is not None:
                raise DemoError(f"the worker ended with exit code {worker.returncode}\n{tail(log)}")
            try:
                answer = health.Check(health_pb2.HealthCheckRequest(service="readiness"), timeout=1)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError:
                pass  # not listening yet
            time.sleep(0.05)
    raise DemoError(f"the worker was not ready after {START_TIMEOUT_S:.0f} s\n{tail(log)}")


def stop(worker: subprocess.Popen[bytes]) -> None:
    """Asks the worker to drain and end; one that does not is killed."""
    worker.terminate()
    try:
        worker.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def tail(log: Path) -> str:
    return "".join(f"  {line}\n" for line in log.read_text(errors="replace").splitlines()[-10:]).rstrip()


def _exit_on_signal(signum: int, frame: FrameType | None) -> None:
    sys.exit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
