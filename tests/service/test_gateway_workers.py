"""The gateway and its workers: health and probes that follow them, turns, addresses that come and go (W-50, W-51)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from service.helpers_gateway import events, executing, status_of
from tokenwire.engine.fake import FakeEngine
from tokenwire.rpc.state import Phase


async def test_health_has_the_fields_of_the_contract(gateway: Any) -> None:
    """W-10."""
    response = await gateway.http.get("/health")
    assert response.status_code == 200
    report = response.json()
    limits = {
        "max_prompt_chars": 32768,
        "max_chat_messages": 64,
        "max_tokens_in": 0,
        "max_tokens_out": 2048,
        "max_token_bytes": 16,
        "max_grammar_bytes": 65536,
    }
    assert {name: report.pop(name) for name in ("status", "model", "phase", "limits")} == {
        "status": "healthy",
        "model": "test-model",
        "phase": "ready",
        "limits": limits,
    }
    assert set(report) == {
        "resident",
        "quant_kind",
        "vram_bytes_used",
        "tokenizer_kind",
        "vocab_size",
        "context_length",
        "uptime_seconds",
        "device",
        "sm",
        "cuda_runtime_version",
        "pool_utilization",
        "active",
        "queued",
        "load_percent",
        "memory",
        "device_name",
        "reason",
    }


async def test_probes_follow_the_worker(start_worker: Any, start_gateway: Any) -> None:
    """W-51."""
    worker = await start_worker(ready=False)
    gateway = await start_gateway(worker.target, ready=False)
    await status_of(gateway, "/health/startup", 503)
    assert (await status_of(gateway, "/health/ready", 503)).json()["status"] == "not ready"
    assert (await status_of(gateway, "/health", 503)).json()["status"] == "unhealthy"
    refused = await gateway.http.post("/execute", json={"job_id": "j", "prompt": "x"})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert refused.json()["error"]["details"]["phase"] == "loading"

    other = await start_worker()
    worker.state.serving = other.state.serving
    worker.state.enter(Phase.READY)
    await status_of(gateway, "/health/startup", 200)
    await status_of(gateway, "/health/ready", 200)
    await status_of(gateway, "/health", 200)

    worker.state.enter(Phase.DRAINING)
    await status_of(gateway, "/health/ready", 503)
    assert (await gateway.http.get("/health/startup")).status_code == 200
    assert (await gateway.http.get("/health/live")).status_code == 200


async def test_a_full_pool_is_not_ready(worker: Any, start_gateway: Any) -> None:
    """W-51."""
    worker.fake.state.used_blocks = 91
    gateway = await start_gateway(worker.target, ready=False)
    await status_of(gateway, "/health/startup", 200)
    response = await status_of(gateway, "/health/ready", 503)
    assert response.json()["reason"] == "pool_near_exhaustion"


async def test_no_worker_at_all(start_gateway: Any) -> None:
    gateway = await start_gateway("127.0.0.1:1", ready=False)
    response = await gateway.http.post("/execute", json={"job_id": "j", "prompt": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "UNAVAILABLE")
    assert "127.0.0.1" not in response.text
    assert (await gateway.http.get("/health")).json() == {"status": "unhealthy", "phase": "unreachable"}
    cancel = await gateway.http.post("/cancel", json={"job_id": "j"})
    assert cancel.status_code == 503


async def test_workers_take_turns_and_one_that_is_not_ready_is_skipped(start_worker: Any, start_gateway: Any) -> None:
    workers = [await start_worker(fake=FakeEngine(eager=True)) for _ in range(3)]
    gateway = await start_gateway(*(worker.target for worker in workers))

    async def run(count: int) -> list[int]:
        for worker in workers:
            worker.fake.jobs.clear()
        for number in range(count):
            body = {"job_id": f"job-{number}", "prompt": "x"}
            assert (await gateway.http.post("/execute", json=body)).status_code == 200
        return [len(worker.fake.jobs) for worker in workers]

    assert await run(6) == [2, 2, 2]
    workers[1].state.enter(Phase.DRAINING)
    # Also before the gateway has heard of it: a refusal that started nothing goes on to the next worker.
    counts = await run(6)
    assert counts[1] == 0
    assert sum(counts) == 6
    await workers[2].server.stop(None)
    assert sum(await run(4)) == 4


async def test_cancel_finds_a_job_of_another_gateway(start_worker: Any, start_gateway: Any) -> None:
    workers = [await start_worker() for _ in range(2)]
    targets = [worker.target for worker in workers]
    first, second = await start_gateway(*targets), await start_gateway(*targets)
    async with executing(first) as response:
        assert response.status_code == 200
        answer = await second.http.post("/cancel", json={"job_id": "job-1"})
        assert answer.json()["outcome"] == "cancelled"


async def test_a_name_stands_for_all_its_addresses(worker: Any, start_gateway: Any) -> None:
    gateway = await start_gateway(f"dns:localhost:{worker.port}", ready=False)
    await status_of(gateway, "/health/ready", 200)
    targets = [known.target for known in gateway.server.gateway.pool.workers]
    assert f"127.0.0.1:{worker.port}" in targets


async def test_a_name_that_loses_an_address_keeps_its_streams(
    worker: Any, start_gateway: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await start_gateway(f"dns:localhost:{worker.port}", ready=False)
    await status_of(gateway, "/health/ready", 200)

    async def look_up(*_: Any, **__: Any) -> list[Any]:
        return [(0, 0, 0, "", ("127.0.0.9", worker.port))]

    async with executing(gateway) as response:
        stream = events(response)
        assert (await anext(stream)).kind == "started"
        job = await worker.submitted()
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", look_up)
        pool = gateway.server.gateway.pool
        await pool._resolve()
        assert [known.target for known in pool.workers] == [f"127.0.0.9:{worker.port}"]
        while job.live:
            job.step()
        assert [event.kind async for event in stream][-1] == "end"
