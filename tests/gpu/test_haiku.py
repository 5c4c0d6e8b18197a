"""Proof that inference is real: a haiku about this minute, from a real model, through `tokenwire serve` on the GPU.

The prompt holds the current minute in words and a nonce, so no answer can be prepared. What the poem says is a matter
of taste and of a small model's powers: the content is a smoke test, the repetition an exact one.
"""

from __future__ import annotations

import secrets
import string
import time
from datetime import datetime, timezone
from typing import Any

import grpc
import pytest

from service.device_failures import Start, answer
from tokenwire.models import resolve
from tokenwire.v1 import inference_pb2 as pb

pytestmark = pytest.mark.gpu

MOST_SECONDS = 30.0
MAX_TOKENS = 100
ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
TENS = ("twenty", "thirty", "forty", "fifty")


def minute_in_words(minute: int) -> str:
    """0–59 in English."""
    ones = [*ONES.split(), "eighteen", "nineteen"]
    if minute < 20:
        return ones[minute]
    tens = TENS[minute // 10 - 2]
    return tens if minute % 10 == 0 else f"{tens}-{ones[minute % 10]}"


def test_minutes_have_their_names() -> None:
    assert [minute_in_words(minute) for minute in (0, 7, 13, 20, 40, 59)] == [
        "zero",
        "seven",
        "thirteen",
        "twenty",
        "forty",
        "fifty-nine",
    ]


def request(job_id: str, minute: str, nonce: str, **sampling: Any) -> pb.ExecuteRequest:
    text = f'Write a haiku about GPU computing. Use the word "{minute}" in it, and end with the code {nonce}.'
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content=text)])
    return pb.ExecuteRequest(job_id=job_id, chat=chat, max_tokens=MAX_TOKENS, **sampling)


def text_and_ids(events: list[pb.ExecuteEvent]) -> tuple[str, list[int]]:
    tokens = [event.token for event in events if event.WhichOneof("event") == "token"]
    return "".join(token.t for token in tokens), [token_id for token in tokens for token_id in token.ids]


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.7, "seed": 42}], ids=["greedy", "seeded"])
async def test_a_haiku_about_this_minute(
    start: Start, sampling: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    worker = await start("real", model=str(resolve("smollm2", fetch=True)), device="cuda", residency_check_sec=0.5)
    await worker.connect()
    minute = minute_in_words(datetime.now(timezone.utc).minute)
    nonce = "".join(secrets.choice(string.ascii_uppercase + string.digits) for _ in range(8))

    events, code = await answer(worker, request("haiku", minute, nonce, **sampling))
    assert code is grpc.StatusCode.OK
    assert time.monotonic() - began < MOST_SECONDS
    poem, ids = text_and_ids(events)
    with capsys.disabled():
        print(f"\n{minute}, {nonce}, {sampling}:\n{poem}")  # noqa: T201 - a person is the judge of poetry
    assert len(poem.split()) >= 5
    assert events[0].started.prompt_tokens > 20
    metrics, end = events[-2].metrics, events[-1].end
    assert metrics.tokens_out == end.tokens_out == len(ids) > 0
    assert metrics.tokens_in == events[0].started.prompt_tokens

    health = await worker.stub.Health(pb.HealthRequest())
    assert health.device.startswith("cuda:")
    assert health.resident
    assert health.vram_bytes_used > 90 * 2**20

    # Exactly repeatable, also in company, and another nonce is another prompt with another answer.
    again, _ = await answer(worker, request("again", minute, nonce, **sampling))
    assert text_and_ids(again) == (poem, ids)
    assert again[-1].end.digest == end.digest
    others = [await answer(worker, request(f"other-{i}", minute, f"XY{i}Z0000", **sampling)) for i in range(3)]
    assert any(text_and_ids(events)[1] != ids for events, _ in others)
