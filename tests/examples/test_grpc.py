"""The examples over gRPC do what they say, against a real worker."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from breaking_proxy import breaking_proxy


def test_a_chat_is_streamed_with_its_numbers(run: Any) -> None:
    done = run(sys.executable, "python/stream.py", "What is the capital of France?")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"\[.+, \d+ prompt tokens, seed 7\]", lines[0])
    assert "Paris" in done.stdout
    assert re.fullmatch(r"\[first token \d+ ms, \d+ tokens/s\]", lines[-2])
    assert re.fullmatch(r"\[\d+ tokens, (eos|max_tokens)\]", lines[-1])


def test_a_worker_that_is_not_there_is_named(run: Any) -> None:
    done = run(sys.executable, "python/stream.py", TOKENWIRE_TARGET="127.0.0.1:1")
    assert done.returncode == 1
    assert done.stderr.startswith("UNAVAILABLE: ")


def test_many_at_once_with_a_cancel_and_a_deadline(run: Any) -> None:
    done = run(sys.executable, "python/many.py")
    assert done.returncode == 0, done.stderr
    for question in ("river", "mountain", "sea", "desert"):
        assert re.search(rf"^Name a {question}\. \S.+ \(\d+ tokens\)$", done.stdout, re.M)
    assert re.search(r"^cancel: cancelled after \d+ tokens$", done.stdout, re.M)
    assert "the story ended with CANCELLED" in done.stdout
    assert re.search(r"^after 0.3 s: (DEADLINE_EXCEEDED|INFERENCE_TIMEOUT)$", done.stdout, re.M)


def test_one_process_goes_on_where_another_left(run: Any) -> None:
    begun = run(sys.executable, "python/resume.py", "begin")
    assert begun.returncode == 0, begun.stderr
    assert len(json.loads(begun.stdout)["ids"]) >= 10
    rest = run(sys.executable, "python/resume.py", "continue", stdin=begun.stdout)
    assert rest.returncode == 0, rest.stderr
    assert rest.stdout.endswith("\n[80 tokens, the digest agrees]\n")
    assert begun.stderr.strip()
    assert rest.stdout[: len(begun.stderr)] != begun.stderr


def messages(output: str) -> list[dict[str, Any]]:
    """The JSON objects that grpcurl printed one after another, behind a heading."""
    decoder = json.JSONDecoder()
    found = []
    at = output.find("{")
    while at >= 0:
        message, end = decoder.raw_decode(output, at)
        found.append(message)
        at = output.find("{", end)
    return found


def test_grpcurl_goes_through_the_whole_contract(run: Any) -> None:
    done = run("shell/grpcurl.sh")
    assert done.returncode == 0, done.stderr
    parts = done.stdout.split("--- ")
    assert '"status": "SERVING"' in parts[1]
    assert '"phase": "ready"' in parts[1]
    tokens = [message["token"] for message in messages(parts[2]) if "token" in message]
    assert "".join(token.get("t", "") for token in tokens).startswith(" Paris")
    assert parts[2].rstrip().endswith("}")
    assert '"stop_reason": "STOP_REASON_MAX_TOKENS"' in parts[2]
    attached = parts[4]
    assert '"started"' in attached
    assert '"i": 250' in attached
    assert '"i": 249' not in attached
    assert '"tokens_out": 300' in attached
    assert "OUTCOME_ALREADY_FINISHED" in parts[5]
    assert "refused, as it should be" in parts[6]
    for field in ("job_id", "temperature"):
        assert field in done.stderr


@pytest.mark.node
async def test_node_streams_and_resumes(run: Any, target: str, javascript: Path) -> None:
    unbroken = await asyncio.to_thread(run, "node", "grpc.mjs", "Once upon a time", cwd=javascript)
    assert unbroken.returncode == 0, unbroken.stderr
    assert unbroken.stdout.endswith("[40 tokens, STOP_REASON_MAX_TOKENS]\n")
    text = unbroken.stdout.split("\n[")[0]
    # Within what every connection carries, even one that finds the job done and gets the rest of it as one event.
    async with breaking_proxy(int(target.split(":")[1]), cuts=[500, 450]) as proxy:
        broken = await asyncio.to_thread(
            run, "node", "grpc.mjs", "Once upon a time", cwd=javascript, TOKENWIRE_TARGET=proxy.target
        )
        assert proxy.num_cut == 2
    assert broken.returncode == 0, broken.stderr
    assert broken.stdout.split("\n[")[0] == text


@pytest.mark.node
def test_node_names_an_error(run: Any, javascript: Path) -> None:
    done = run("node", "grpc.mjs", "", cwd=javascript)
    assert done.returncode == 1
    assert done.stderr.startswith("INVALID_ARGUMENT: ")
