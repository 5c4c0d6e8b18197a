"""The service benchmark on a tiny real model, with a scripted program in llama-server's place."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Speaks as llama-server does: chunks that do not end where events end, a token that no event of its own carries, and a
# connection that closes. It generates `short` tokens fewer than asked for, or refuses everything.
PEER = """#!{python}
import argparse, json, pathlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with open("{log}", "a") as log:
            log.write(json.dumps(body) + "\\n")
        if {refuse}:
            self.send_error(503)
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Connection", "close")
        self.end_headers()
        wanted = body["n_predict"] - {short}
        events = [{{"content": "x", "stop": False}} for _ in range(wanted - 1)]
        events.append({{"content": "", "stop": True, "stop_type": "limit", "tokens_predicted": wanted,
                       "tokens_evaluated": len(body["prompt"].split())}})
        data = b"".join(b"data: " + json.dumps(event).encode() + b"\\n\\n" for event in events)
        for part in (data[:7], data[7:50], data[50:]):
            self.wfile.write(f"{{len(part):x}}\\r\\n".encode() + part + b"\\r\\n")
        self.wfile.write(b"0\\r\\n\\r\\n")

parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int)
port = parser.parse_known_args()[0].port
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "tiny.gguf"
    command = [sys.executable, "-m", "benchmarks.make_model", "tiny", "q8_0", str(path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    return path


def bench(model: Path, peer: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.service", str(model), "--llama-server", str(peer), "--threads", "1"]
    command += ["--concurrency", "2", "--requests", "3", "--prompt-words", "3", "--max-tokens", "5", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)


def write_peer(tmp_path: Path, short: int = 0, refuse: bool = False) -> tuple[Path, Path]:
    program, log = tmp_path / "peer", tmp_path / "requests"
    program.write_text(PEER.format(python=sys.executable, log=log, short=short, refuse=refuse))
    program.chmod(0o755)
    return program, log


def test_all_three_do_the_same_work_in_turns(model: Path, tmp_path: Path) -> None:
    program, log = write_peer(tmp_path)
    file = tmp_path / "report.json"
    result = bench(model, program, "--runs", "2", "--json", str(file))
    assert result.returncode == 0, result.stderr
    runs: dict[str, list[dict[str, Any]]] = json.loads(file.read_text())["runs"]
    assert {name: len(rows) for name, rows in runs.items()} == {"engine alone": 2, "tokenwire": 2, "llama-server": 2}
    assert all(row["tokens_per_second"] > 0 and row["ttft_p50"] > 0 for rows in runs.values() for row in rows)
    # Both sides of our own path read the same prompts; two runs read different ones.
    assert [row["prompt_tokens"] for row in runs["tokenwire"]] == [row["prompt_tokens"] for row in runs["engine alone"]]
    assert "the service's share of the engine's rate: " in result.stdout
    assert "to llama-server: tokens/s × " in result.stdout
    bodies = [json.loads(line) for line in log.read_text().splitlines()]
    assert len({body["prompt"] for body in bodies}) == len(bodies) == 9  # with the run that is not counted
    assert {(body["n_predict"], body["temperature"], body["ignore_eos"]) for body in bodies} == {(5, 0, True)}


def test_a_peer_that_did_less_work_is_no_result(model: Path, tmp_path: Path) -> None:
    for arguments, complaint in (
        ({"short": 1}, "a run counted 12 tokens of 15; failed requests: {}"),
        ({"refuse": True}, "a run counted 0 tokens of 15; failed requests: {'HTTP 503': 3}"),
    ):
        result = bench(model, write_peer(tmp_path, **arguments)[0], "--runs", "1")
        assert result.returncode == 1
        assert complaint in result.stderr


def test_a_peer_that_does_not_start_is_shown_with_its_words(model: Path, tmp_path: Path) -> None:
    program = tmp_path / "peer"
    program.write_text("#!/bin/sh\necho no such model\nexit 3\n")
    program.chmod(0o755)
    result = bench(model, program)
    assert result.returncode == 1
    assert "is not ready:\nno such model" in result.stderr
