"""The user's whole path with the real model: `tokenwire serve` in a process of its own, the client, many requests."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.helpers_server import running_worker
from tokenwire import models
from tokenwire._native import GgufFile
from tokenwire.client import Client, Generation, Message
from tokenwire.text import TextPipeline, load_text

TEXTS = sorted((Path(__file__).parent.parent / "golden" / "texts").iterdir())


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with running_worker(models.resolve("smollm2", fetch=True)) as address:
        yield address


@pytest.fixture(scope="module")
def client(target: str) -> Iterator[Client]:
    with Client(target) as client:
        yield client


@pytest.fixture(scope="module")
def text() -> Iterator[TextPipeline]:
    path = models.resolve("smollm2", fetch=True)
    pipeline = load_text(GgufFile(str(path)), path)
    yield pipeline
    pipeline.close()


def prompt_of(path: Path) -> str:
    """The beginning of a golden text; a conversation's file is continued as the text that it is."""
    return path.read_text(encoding="utf-8")[:600]


def digest_of(answer: Generation) -> str:
    return hashlib.sha256(b"".join(struct.pack("<I", token) for token in answer.token_ids)).hexdigest()


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.7, "seed": 42}], ids=["greedy", "seeded"])
def test_a_hundred_times_the_same_request_is_a_hundred_times_the_same_bytes(
    client: Client, sampling: dict[str, float]
) -> None:
    answers = [
        client.generate("Write a haiku about GPU computing", max_tokens=24, logprobs=2, **sampling)  # type: ignore[arg-type]
        for _ in range(100)
    ]
    assert len({answer.text for answer in answers}) == 1
    assert len({answer.token_ids for answer in answers}) == 1
    assert len({answer.logprobs for answer in answers}) == 1
    assert {answer.end.digest for answer in answers} == {digest_of(answers[0])}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_streamed_text_is_the_offline_decode_of_its_ids(client: Client, text: TextPipeline, path: Path) -> None:
    """Also for seeded answers that wander; an answer cut inside a character ends in one replacement character."""
    prompt = prompt_of(path)
    for seed in (1, 2):
        answer = client.generate(prompt, max_tokens=40, temperature=1.0, seed=seed)
        assert answer.text == text.tokenizer.decode(list(answer.token_ids))
        cut = answer.end.stop_reason == "max_tokens"
        assert "\ufffd" not in (answer.text[:-1] if cut else answer.text)
        assert answer.end.tokens_out == len(answer.token_ids)
        assert answer.end.digest == digest_of(answer)


def test_the_command_line_streams_the_same_answer(client: Client, target: str) -> None:
    command = [sys.executable, "-m", "tokenwire", "generate", "Count to five.", "--target", target]
    command += ["--temperature", "0", "--max-tokens", "16", "--json"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    events = [json.loads(line) for line in lines]
    streamed = "".join(event["text"] for event in events if event["event"] == "token")
    answer = client.generate(messages=[Message(role="user", content="Count to five.")], max_tokens=16, temperature=0.0)
    assert streamed == answer.text
