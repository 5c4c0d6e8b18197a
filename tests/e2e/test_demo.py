"""`make demo` end to end: the real model, a worker process, a stream over gRPC, and nothing left behind."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
DEMO = [sys.executable, str(ROOT / "scripts" / "demo.py")]
TIMEOUT_S = 300

pytestmark = pytest.mark.timeout(TIMEOUT_S)


def is_listening(target: str) -> bool:
    with grpc.insecure_channel(target, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=0.5)
        except grpc.FutureTimeoutError:
            return False
        return True


def test_the_demo_streams_a_poem_and_stops_its_worker() -> None:
    result = subprocess.run(DEMO, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) >= 5
    ready = re.search(r"worker ready at (\S+) after [\d.]+ s\n", result.stderr)
    assert ready is not None, result.stderr
    summary = re.search(r"(\d+) tokens, TTFT \d+ ms, ([\d.]+) tokens/s, stopped by ", result.stderr)
    assert summary is not None, result.stderr
    assert int(summary[1]) >= 5
    assert float(summary[2]) > 0
    assert not is_listening(ready[1])


def test_the_demo_shows_the_same_poem_every_time() -> None:
    outputs = {subprocess.run(DEMO, stdout=subprocess.PIPE, timeout=TIMEOUT_S, check=True).stdout for _ in range(2)}
    assert len(outputs) == 1


def test_a_demo_that_is_told_to_stop_leaves_no_worker() -> None:
    with subprocess.Popen(DEMO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        assert demo.stderr is not None
        line = demo.stderr.readline()
        assert line.startswith("worker ready at "), line
        workers = [child for child in psutil.Process(demo.pid).children() if "serve" in child.cmdline()]
        assert len(workers) == 1
        demo.send_signal(signal.SIGTERM)
        demo.communicate(timeout=TIMEOUT_S)
    assert demo.returncode == 128 + signal.SIGTERM
    assert not workers[0].is_running()


def test_a_model_that_is_not_there_is_said_in_a_line() -> None:
    command = [*DEMO, "--model", "no-such-model"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert result.returncode == 1
    assert "there is no file no-such-model" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_worker_that_cannot_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF\x03\x00\x00\x00")
    command = [*DEMO, "--model", str(broken)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert result.returncode == 1
    assert "error: the worker ended with exit code 1\n" in result.stderr
    assert "MODEL_LOAD_FAILED" in result.stderr
