"""What must hold when a device fails, whatever it is: run on the CPU by test_device_failures.py, on a GPU by tests/gpu.

A worker's warm-up takes steps 0 and 1, so the first client's prefill is step 2.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from service.worker_process import Process, kinds, rest
from tokenwire.v1 import inference_pb2 as pb
from unit.gguf_builder import tiny_llama

Start = Callable[..., Awaitable[Process]]
Case = Callable[[Start, Path, str], Awaitable[None]]
# Jobs that arrive this close to one another share their steps from the first on.
TOGETHER = {"batch_window_ms": 500}
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def tiny_model(folder: Path) -> str:
    return str(tiny_llama(folder / "model.gguf", dtype="Q8_0", context=512).path)


def job(job_id: str, length: int = 12, **fields: Any) -> pb.ExecuteRequest:
    ids = pb.TokenIds(ids=[3 + (7 * i + len(job_id)) % 250 for i in range(length)])
    fields = {"max_tokens": 40, "temperature": 0.8, "seed": 5, "logit_bias": {2: -100.0}, **fields}
    return pb.ExecuteRequest(job_id=job_id, prompt_tokens=ids, **fields)


async def answer(worker: Process, request: pb.ExecuteRequest) -> tuple[list[pb.ExecuteEvent], grpc.StatusCode]:
    call = worker.stub.Execute(request)
    events = await rest(call)
    return events, await call.code()


def digest(events: list[pb.ExecuteEvent]) -> str:
    assert events[-1].WhichOneof("event") == "end", events[-1]
    return events[-1].end.digest


async def check_readiness(worker: Process) -> int:
    response = await worker.health.Check(health_pb2.HealthCheckRequest(service="readiness"))
    return int(response.status)


async def out_of_memory_ends_one_job(start: Start, folder: Path, device: str) -> None:
    """The job that asked the step for most fails; its neighbours' bytes, the next job and the process are unharmed."""
    model = tiny_model(folder)
    whole = await start("real", model=model, device=device)
    await whole.connect()
    expected = {name: digest((await answer(whole, job(name)))[0]) for name in ("aa", "bbb", "cccc")}

    worker = await start("real", model=model, device=device, fault_injection="oom@14", **TOGETHER)
    await worker.connect()
    results = await asyncio.gather(*(answer(worker, job(name)) for name in expected))
    survivors = dict(zip(expected, results, strict=True))
    failed = {name: survivors.pop(name) for name in expected if survivors[name][1] is not grpc.StatusCode.OK}
    assert len(failed) == 1
    for events, code in failed.values():
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert kinds(events)[-3:] == ["token", "metrics", "error"]
        assert (events[-1].error.code, events[-1].error.retriable) == ("VRAM_OOM", True)
    assert {name: digest(events) for name, (events, _) in survivors.items()} == {
        name: expected[name] for name in survivors
    }

    for name in expected:  # the worker is whole again
        assert digest((await answer(worker, job(name)))[0]) == expected[name]
    health = await worker.stub.Health(pb.HealthRequest())
    assert (health.status, health.resident) == (pb.HealthResponse.STATUS_HEALTHY, True)
    assert health.active == 0
    assert health.pool_utilization == 0
    worker.process.terminate()
    assert await worker.exit_status() == 0


async def out_of_memory_in_the_prefill_ends_that_job(start: Start, folder: Path, device: str) -> None:
    worker = await start("real", model=tiny_model(folder), device=device, fault_injection="oom@2")
    await worker.connect()
    events, code = await answer(worker, job("large", 300))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert kinds(events) == ["started", "metrics", "error"]
    assert events[-1].error.code == "VRAM_OOM"
    events, code = await answer(worker, job("small"))
    assert code is grpc.StatusCode.OK
    assert events[-1].end.tokens_out == 40


async def a_failed_device_ends_every_stream_and_the_process(start: Start, folder: Path, device: str) -> None:
    worker = await start("real", model=tiny_model(folder), device=device, fault_injection="device-error@12", **TOGETHER)
    await worker.connect()
    results = await asyncio.gather(*(answer(worker, job(name, max_tokens=200)) for name in ("aa", "bbb", "cccc")))
    for events, code in results:
        assert code is grpc.StatusCode.INTERNAL
        assert kinds(events)[-2:] == ["metrics", "error"]
        assert (events[-1].error.code, events[-1].error.message) == ("CUDA_ERROR", "the device failed")
    assert await worker.exit_status() == 70
    errors = [line for line in worker.lines if line["event"] == "error"]
    assert [line["code"] for line in errors] == ["CUDA_ERROR"]


async def memory_elsewhere_turns_health_and_readiness_off(start: Start, folder: Path, device: str) -> None:
    flags = {"device": device, "fault_injection": "host-memory@6", "residency_check_sec": 0.05}
    worker = await start("real", model=tiny_model(folder), **flags)
    await worker.connect()
    health = await worker.stub.Health(pb.HealthRequest())
    assert (health.status, health.resident) == (pb.HealthResponse.STATUS_HEALTHY, True)
    assert await check_readiness(worker) == SERVING
    watch = worker.health.Watch(health_pb2.HealthCheckRequest(service="readiness"))
    assert (await watch.read()).status == SERVING
    _, code = await answer(worker, job("a"))
    assert code is grpc.StatusCode.OK
    assert (await asyncio.wait_for(watch.read(), 20)).status == NOT_SERVING
    health = await worker.stub.Health(pb.HealthRequest())
    assert (health.status, health.resident) == (pb.HealthResponse.STATUS_UNHEALTHY, False)
    assert health.HasField("residency_age_seconds")
    line = await worker.log_line("residency_violation")
    assert line["level"] == "critical"
    assert "weights" in line["message"]


async def too_little_memory_at_the_start_is_one_line(start: Start, folder: Path, device: str) -> None:
    model = tiny_model(folder)
    worker = await start("real", model=model, device=device, kv_cache_size_mb=2**24 - 1)
    assert await worker.exit_status() == 1
    errors = [line for line in worker.lines if line["level"] == "error"]
    assert [line["code"] for line in errors] == ["INSUFFICIENT_VRAM"]
    message = errors[0]["message"]
    assert "\n" not in message
    assert f"required {(2**24 - 1) * 2**20} bytes" in message
    assert "available " in message
    assert f"on {device}" in message
    assert model in message
