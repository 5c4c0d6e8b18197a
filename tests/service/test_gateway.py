"""The gateway's own paths against a real gRPC worker: streams, refusals, cancels (W-50)."""

from __future__ import annotations

import asyncio
import hashlib
import struct
from typing import Any

import pytest

from service.helpers_gateway import events, executing
from tokenwire.engine.fake import FakeEngine, FakeEngineError, FakeOutcome


async def test_a_stream_has_the_events_of_the_contract(worker: Any, gateway: Any) -> None:
    worker.fake.eager = True
    async with executing(gateway, seed=2**64 - 1) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-store"
        got = [event async for event in events(response)]
    assert [event.kind for event in got] == ["started", "token", "metrics", "end"]
    assert got[0].data == {
        "job_id": "job-1",
        "model": "test-model",
        "started_at": "2023-11-14T22:13:20Z",
        "seed": 2**64 - 1,
        "prompt_tokens": 5,
        "cached_tokens": 0,
    }
    assert got[1].data == {"t": "Hello world!", "i": 0}
    assert got[2].data["tokens_in"] == 5
    digest = hashlib.sha256(struct.pack("<3I", 0, 1, 2)).hexdigest()
    assert got[3].data == {"tokens_out": 3, "decode_time_ms": 2, "stop_reason": "EOS", "digest": digest}
    assert [event.id for event in got] == ["0", "3", "3", "3"]


async def test_each_token_is_sent_when_it_comes(worker: Any, gateway: Any) -> None:
    async with executing(gateway) as response:
        stream = events(response)
        assert (await anext(stream)).kind == "started"
        job = await worker.submitted()
        for place, text in enumerate(("Hello", " world", "!")):
            job.step()
            event = await asyncio.wait_for(anext(stream), 20)
            assert (event.data, event.id) == ({"t": text, "i": place}, str(place + 1))
        assert [event.kind async for event in stream] == ["metrics", "end"]


async def test_v2_is_an_alias(worker: Any, gateway: Any) -> None:
    worker.fake.eager = True
    response = await gateway.http.post("/v2/execute", json={"job_id": "job-1", "prompt": "x"})
    assert "event: end" in response.text


async def test_every_field_reaches_the_worker(worker: Any, gateway: Any) -> None:
    worker.fake.eager = True
    numbers = {
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 3,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "frequency_penalty": -0.5,
        "presence_penalty": 0.75,
        "seed": 2**63,
        "logprobs": 2,
    }
    body = {"job_id": "job-1", "prompt": "x", **numbers, "stop": ["a", "b"], "logit_bias": {"5": -1.5}}
    assert (await gateway.http.post("/execute", json=body)).status_code == 200
    spec = worker.fake.jobs[-1].spec
    assert {name: spec[name] for name in numbers} == numbers
    assert (spec["stop"], spec["logit_bias"]) == ([b"a", b"b"], {5: -1.5})


@pytest.mark.parametrize(
    ("fields", "ids"),
    [({"prompt_tokens": [3, 4]}, [3, 4]), ({"messages": [{"role": "user", "content": "ab"}]}, [97, 98])],
    ids=["ids", "messages"],
)
async def test_other_inputs(worker: Any, gateway: Any, fields: dict[str, Any], ids: list[int]) -> None:
    worker.fake.eager = True
    assert (await gateway.http.post("/execute", json={"job_id": "job-1", **fields})).status_code == 200
    assert worker.fake.jobs[-1].spec["prompt_ids"] == ids


async def test_violations_of_type_and_value_come_together(gateway: Any) -> None:
    body = {"job_id": "no spaces", "prompt": 3, "max_tokens": True, "temperature": 9, "stop": [""], "seed": 1.0}
    response = await gateway.http.post("/execute", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["retriable"]) == ("INVALID_REQUEST", False)
    assert error["correlation_id"] == response.headers["x-correlation-id"]
    refused = {field["field"]: (field["reason"], field["constraint"]) for field in error["details"]["fields"]}
    assert refused == {
        "job_id": ("PATTERN", "pattern([A-Za-z0-9._:-]{1,128})"),
        "prompt": ("TYPE", "type(string)"),
        "max_tokens": ("TYPE", "type(integer)"),
        "temperature": ("RANGE", "range(0..=2)"),
        "stop[0]": ("NON_EMPTY", "non_empty"),
        "seed": ("TYPE", "type(integer)"),
    }
    assert next(field["value"] for field in error["details"]["fields"] if field["field"] == "temperature") == "9"


async def test_what_only_the_worker_can_know_is_refused_with_its_words(gateway: Any) -> None:
    response = await gateway.http.post("/execute", json={"job_id": "j", "prompt": "x" * 4000, "max_tokens": 200})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["details"]) == ("CONTEXT_LENGTH_EXCEEDED", {"limit": 4096, "actual": 4200})
    assert error["correlation_id"] == response.headers["x-correlation-id"]
    response = await gateway.http.post("/execute", json={"job_id": "j", "prompt": "x", "stop": ["x" * 33]})
    assert [field["field"] for field in response.json()["error"]["details"]["fields"]] == ["stop[0]"]


async def test_sixteen_of_many_violations(gateway: Any) -> None:
    biases = {str(token): 1000 for token in range(20)}
    response = await gateway.http.post("/execute", json={"job_id": "j", "prompt": "x", "logit_bias": biases})
    details = response.json()["error"]["details"]
    assert len(details["fields"]) == 16
    assert (details["truncated"], details["violations"]) == (True, 20)


async def test_unknown_fields_are_ignored_and_counted(worker: Any, gateway: Any) -> None:
    worker.fake.eager = True
    body = {"job_id": "job-1", "prompt": "x", "colour": "green", "shape": {"round": True}}
    assert (await gateway.http.post("/execute", json=body)).status_code == 200
    assert gateway.server.gateway.num_unknown_fields == 2


async def test_a_live_job_id_is_a_conflict(worker: Any, gateway: Any) -> None:
    async with executing(gateway) as response:
        assert response.status_code == 200
        again = await gateway.http.post("/execute", json={"job_id": "job-1", "prompt": "x"})
        assert (again.status_code, again.json()["error"]["code"]) == (409, "ALREADY_EXISTS")


async def test_a_full_queue_says_when_to_come_again(worker: Any, gateway: Any) -> None:
    worker.fake.submit_error = FakeEngineError("OVERLOADED", "the queue is full")
    response = await gateway.http.post("/execute", json={"job_id": "job-1", "prompt": "x"})
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    assert (response.json()["error"]["code"], response.json()["error"]["retriable"]) == ("OVERLOADED", True)


async def test_a_failure_in_the_stream_is_its_last_event(worker: Any, gateway: Any) -> None:
    async with executing(gateway) as response:
        stream = events(response)
        assert (await anext(stream)).kind == "started"
        job = await worker.submitted()
        job.step()
        job.finish(FakeOutcome(error_code="VRAM_OOM", error_message="the device ran out of memory in a step"))
        got = [event async for event in stream]
    assert [event.kind for event in got] == ["token", "metrics", "error"]
    message = "the device ran out of memory in a step"
    assert got[-1].data == {"code": "VRAM_OOM", "message": message, "retriable": True}


async def test_cancel_is_accepted_and_ends_the_stream(worker: Any, gateway: Any) -> None:
    async with executing(gateway) as response:
        stream = events(response)
        assert (await anext(stream)).kind == "started"
        (await worker.submitted()).step()
        assert (await anext(stream)).kind == "token"
        outcomes = []
        for job_id in ("job-1", "job-1", "job-2"):
            answer = await gateway.http.post("/cancel", json={"job_id": job_id})
            assert answer.status_code == 202
            outcomes.append(answer.json())
        got = [event async for event in stream]
    assert [outcome["outcome"] for outcome in outcomes] == ["cancelled", "already_finished", "not_found"]
    assert outcomes[0] == {"job_id": "job-1", "outcome": "cancelled", "tokens_out": 1}
    assert (got[-1].kind, got[-1].data["code"]) == ("error", "CANCELLED")


async def test_a_client_that_leaves_cancels_its_job(worker: Any, gateway: Any) -> None:
    """H25."""
    async with executing(gateway) as response:
        stream = events(response)
        await anext(stream)
        job = await worker.submitted()
        job.step()
        await anext(stream)
        await stream.aclose()
    assert await asyncio.to_thread(job.cancelled.wait, 20)
    assert await worker.engine.wait_idle(20)


async def test_a_client_that_leaves_before_its_job_began_cancels_it(worker: Any, gateway: Any) -> None:
    worker.text.gate.clear()
    asking = asyncio.ensure_future(gateway.http.post("/execute", json={"job_id": "job-1", "prompt": "x"}))
    assert await asyncio.to_thread(worker.text.entered.acquire, timeout=20)
    asking.cancel()
    await asyncio.wait([asking])
    worker.text.gate.set()
    assert await worker.engine.wait_idle(20)


async def test_silence_is_filled_with_comments(worker: Any, start_gateway: Any) -> None:
    """W-53. A job that waits long for its admission gets its headers all the same."""
    gateway = await start_gateway(worker.target, http_heartbeat_ms=50)
    worker.text.gate.clear()
    async with executing(gateway) as response:
        assert response.status_code == 200
        stream = events(response)
        assert [(await anext(stream)).kind for _ in range(2)] == [":", ":"]
        worker.text.gate.set()
        kinds = [(await anext(stream)).kind for _ in range(5)]
        assert "started" in kinds
        (await worker.submitted()).cancel()
        assert [event.kind async for event in stream if event.kind != ":"][-1] == "error"


async def test_a_refusal_after_a_long_wait_is_an_error_event(worker: Any, start_gateway: Any) -> None:
    gateway = await start_gateway(worker.target, http_heartbeat_ms=50)
    worker.text.gate.clear()
    async with executing(gateway, prompt="x" * 4096) as response:
        stream = events(response)
        assert (await anext(stream)).kind == ":"
        worker.text.gate.set()
        assert [event.data["code"] async for event in stream if event.kind != ":"] == ["CONTEXT_LENGTH_EXCEEDED"]


async def test_resuming_by_a_new_post_is_refused(gateway: Any) -> None:
    """H26."""
    body = {"job_id": "job-1", "prompt": "x"}
    response = await gateway.http.post("/execute", json=body, headers={"last-event-id": "3"})
    assert response.status_code == 400
    assert response.json()["error"]["details"]["fields"][0]["reason"] == "RESUME_UNSUPPORTED"


HOSTILE = ["\n\n", "data: {}\n\n", "event: end\r\n", "\x00", "\r", "\u2028", "\u2029", "\x85", '"\\', "🌍", "\ufeff"]


async def test_text_that_looks_like_a_frame_stays_text(start_worker: Any, start_gateway: Any) -> None:
    """H29, U2."""
    worker = await start_worker(fake=FakeEngine(HOSTILE))
    gateway = await start_gateway(worker.target)
    async with executing(gateway) as response:
        job = await worker.submitted()
        for _ in HOSTILE:
            job.step()
        got = [event async for event in events(response)]
    assert "".join(event.data["t"] for event in got if event.kind == "token") == "".join(HOSTILE)


async def test_correlation_ids_are_kept_made_and_passed_on(gateway: Any) -> None:
    """W-24."""
    for name in ("x-correlation-id", "x-request-id"):
        kept = await gateway.http.get("/health/live", headers={name: "Mine_1.2-3"})
        assert kept.headers["x-correlation-id"] == kept.headers["x-request-id"] == "Mine_1.2-3"
    made = await gateway.http.get("/nowhere", headers={"x-correlation-id": "not well formed"})
    assert made.status_code == 404
    assert made.json()["error"]["correlation_id"] == made.headers["x-correlation-id"] != "not well formed"


async def test_a_detached_stream_is_taken_up_again(worker: Any, gateway: Any) -> None:
    """With `from`, with what an `EventSource` sends, and from the start; all give the same bytes and digests."""
    token = "t" * 32
    async with executing(gateway, detach=True, attach_token=token) as response:
        stream = events(response)
        started = await anext(stream)
        assert started.data["attach_token"] == token
        job = await worker.submitted()
        job.step()
        first = await anext(stream)
        await stream.aclose()
    assert not job.cancelled.is_set()
    while job.live:
        job.step()
    async with gateway.http.stream("GET", f"/execute/job-1?from=1&token={token}") as response:
        rest = [event async for event in events(response)]
    headers = {"last-event-id": first.id, "x-attach-token": token}
    async with gateway.http.stream("GET", "/execute/job-1?from=0", headers=headers) as response:
        assert [event async for event in events(response)] == rest
    async with gateway.http.stream("GET", "/execute/job-1", headers={"x-attach-token": token}) as response:
        whole = [event async for event in events(response)]
    texts = ["".join(event.data["t"] for event in got if event.kind == "token") for got in (rest, whole)]
    assert texts == [" world!", "Hello world!"]
    assert (rest[0].data, rest[-1]) == (started.data, whole[-1])
    assert (rest[0].id, rest[1].data["i"]) == ("1", 1)
    assert rest[-1].data["digest"].startswith(rest[-3].data["digest"])


async def test_a_stream_is_taken_up_by_its_owner_only(worker: Any, gateway: Any) -> None:
    async with executing(gateway, detach=True, attach_token="t" * 32) as response:
        await anext(events(response))
        for path, status in (
            ("/execute/job-1?token=" + "u" * 32, 404),
            ("/execute/job-2?token=" + "t" * 32, 404),
            ("/execute/job-1", 400),
            ("/execute/job-1?from=-1&token=" + "t" * 32, 400),
            ("/execute/job-1?from=99999999999&token=" + "t" * 32, 400),
        ):
            assert (await gateway.http.get(path)).status_code == status, path


async def test_a_response_format_reaches_the_validator(gateway: Any) -> None:
    body = {"job_id": "j", "prompt": "x", "response_format": {"json_schema": {"type": 3}, "regex": "a"}}
    response = await gateway.http.post("/execute", json=body)
    fields = [field["field"] for field in response.json()["error"]["details"]["fields"]]
    assert fields == ["response_format"]
