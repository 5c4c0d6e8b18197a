"""The servers' processes of a benchmark, and whose processor time was whose."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class ProcessorTimes:
    """Seconds of processor time: this process's, and what neither it nor the given processes used."""

    client_s: float
    others_s: float

    @classmethod
    def now(cls, pids: Sequence[int]) -> ProcessorTimes:
        tick_s = 1 / os.sysconf("SC_CLK_TCK")
        # user, nice, system, idle, iowait, irq, softirq, steal
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        busy_s = (sum(fields) - fields[3] - fields[4]) * tick_s
        client_s = time.process_time()
        return cls(client_s, busy_s - client_s - sum(_process_s(pid, tick_s) for pid in pids))

    def __sub__(self, earlier: ProcessorTimes) -> ProcessorTimes:
        return ProcessorTimes(self.client_s - earlier.client_s, self.others_s - earlier.others_s)


def _process_s(pid: int, tick_s: float) -> float:
    # The name, in parentheses, may hold spaces; user and system time are the 12th and 13th field after it.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * tick_s


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: Sequence[str], is_ready: Callable[[], bool]) -> Iterator[int]:
    """Runs a server until the block ends; gives its process id. Its output is shown only if it does not get ready."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline_s = time.monotonic() + START_TIMEOUT_S
            while not is_ready():
                if process.poll() is not None or time.monotonic() > deadline_s:
                    log.seek(0)
                    raise RuntimeError(f"{command[0]} is not ready:\n{log.read().decode(errors='replace')[-2000:]}")
                time.sleep(0.1)
            yield process.pid
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def worker_is_ready(target: str) -> bool:
    command = [sys.executable, "-m", "tokenwire", "health", "--target", target]
    return subprocess.run(command, capture_output=True).returncode == 0


def llama_server_is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
