"""Health in its three shapes: our own, `grpc.health.v1` Check, and a Watch that follows every change."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from tokenwire.rpc.state import Phase
from tokenwire.v1 import inference_pb2 as pb

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


async def check(worker: Any, service: str) -> int:
    return int((await worker.health.Check(health_pb2.HealthCheckRequest(service=service))).status)


async def test_health_reports_model_engine_and_phase(worker: Any) -> None:
    worker.fake.state.used_blocks = 25
    health = await worker.stub.Health(pb.HealthRequest())
    assert health.status == pb.HealthResponse.STATUS_HEALTHY
    assert (health.model, health.quant_kind, health.tokenizer_kind) == ("test-model", "Q4_1", "gguf-bpe")
    assert (health.vocab_size, health.context_length, health.device) == (1000, 4096, "cpu")
    assert (health.phase, health.pool_utilization, health.vram_bytes_used) == ("ready", 0.25, 0)
    assert health.resident


async def test_a_nearly_full_pool_is_degraded(worker: Any) -> None:
    worker.fake.state.used_blocks = 91
    assert (await worker.stub.Health(pb.HealthRequest())).status == pb.HealthResponse.STATUS_DEGRADED


@pytest.mark.parametrize(
    ("phase", "serving"),
    [
        (Phase.LOADING, {"liveness"}),
        (Phase.READY, {"", "liveness", "readiness", "startup", "tokenwire.v1.Inference"}),
        (Phase.DRAINING, {"liveness", "startup"}),
        (Phase.FAILED, set()),
    ],
)
async def test_each_phase_serves_what_it_should(start_worker: Any, phase: Phase, serving: set[str]) -> None:
    worker = await start_worker(ready=phase is not Phase.LOADING)
    worker.state.enter(phase)
    for service in ("", "liveness", "readiness", "startup", "tokenwire.v1.Inference"):
        assert await check(worker, service) == (SERVING if service in serving else NOT_SERVING), service


async def test_an_unknown_service_is_not_found(worker: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await check(worker, "nothing")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    watch = worker.health.Watch(health_pb2.HealthCheckRequest(service="nothing"))
    assert (await watch.read()).status == UNKNOWN
    watch.cancel()


async def test_every_watcher_sees_every_change(start_worker: Any) -> None:
    worker = await start_worker()
    watches = [worker.health.Watch(health_pb2.HealthCheckRequest(service="readiness")) for _ in range(3)]
    for watch in watches:
        assert (await asyncio.wait_for(watch.read(), 20)).status == SERVING
    watches[0].cancel()  # one that leaves must not deafen the others
    while worker.state.num_watchers == 3:
        await check(worker, "readiness")  # a round trip gives the server time to see it leave
    worker.state.enter(Phase.DRAINING)
    for watch in watches[1:]:
        assert (await asyncio.wait_for(watch.read(), 20)).status == NOT_SERVING
    for watch in watches:
        watch.cancel()


async def test_a_change_that_does_not_concern_a_service_is_not_sent(start_worker: Any) -> None:
    worker = await start_worker()
    watch = worker.health.Watch(health_pb2.HealthCheckRequest(service="liveness"))
    assert (await asyncio.wait_for(watch.read(), 20)).status == SERVING
    worker.state.enter(Phase.DRAINING)
    assert await check(worker, "readiness") == NOT_SERVING  # a round trip later, the drain was not news for liveness
    worker.state.enter(Phase.FAILED)
    assert (await asyncio.wait_for(watch.read(), 20)).status == NOT_SERVING
    watch.cancel()


async def test_a_failed_worker_stays_failed(worker: Any) -> None:
    worker.state.enter(Phase.FAILED)
    worker.state.enter(Phase.DRAINING)
    assert (await worker.stub.Health(pb.HealthRequest())).phase == "failed"


async def test_a_pool_near_exhaustion_turns_readiness_off_but_admits(worker: Any) -> None:
    worker.fake.state.used_blocks = 91
    assert await check(worker, "readiness") == NOT_SERVING
    assert await check(worker, "tokenwire.v1.Inference") == SERVING
    assert (await worker.stub.Health(pb.HealthRequest())).reason == "pool_near_exhaustion"
    worker.fake.state.used_blocks = 90
    assert await check(worker, "readiness") == SERVING


async def test_a_stuck_engine_fails_liveness_and_a_watch_sees_it(worker: Any) -> None:
    watch = worker.health.Watch(health_pb2.HealthCheckRequest(service="liveness"))
    assert (await asyncio.wait_for(watch.read(), 20)).status == SERVING
    worker.fake.state.heartbeat_age_ms = worker.state.liveness_s * 1000 + 1
    worker.state.refresh()
    assert (await asyncio.wait_for(watch.read(), 20)).status == NOT_SERVING
    health = await worker.stub.Health(pb.HealthRequest())
    assert (health.status, health.reason) == (pb.HealthResponse.STATUS_UNHEALTHY, "engine_stalled")
    worker.fake.state.heartbeat_age_ms = 0.0
    worker.state.refresh()
    assert (await asyncio.wait_for(watch.read(), 20)).status == SERVING
    watch.cancel()


async def test_a_degraded_worker_serves_but_is_not_ready(worker: Any) -> None:
    worker.state.degraded = "the old model serves: the new one did not load"
    assert [await check(worker, name) for name in ("readiness", "liveness", "")] == [NOT_SERVING, SERVING, SERVING]
    health = await worker.stub.Health(pb.HealthRequest())
    assert (health.status, health.reason) == (pb.HealthResponse.STATUS_DEGRADED, "degraded")


async def test_a_dead_engine_fails_every_probe_before_anyone_moved_the_phase(worker: Any) -> None:
    worker.fake.state.failure = "the loop thread threw"
    for service in ("", "liveness", "readiness", "startup", "tokenwire.v1.Inference"):
        assert await check(worker, service) == NOT_SERVING, service
