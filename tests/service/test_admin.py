"""The operator's service: drain and undrain, the batch window, the cache, the configuration (A-8)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from tokenwire.config import MASK, Settings, shown_settings
from tokenwire.config_sources import load_settings
from tokenwire.rpc.admin import Control
from tokenwire.rpc.server import build_admin_server
from tokenwire.v1 import admin_pb2 as pb
from tokenwire.v1 import admin_pb2_grpc, inference_pb2

Request = Callable[..., inference_pb2.ExecuteRequest]


@dataclass
class Admin:
    stub: Any
    worker: Any
    stopping: asyncio.Event


@pytest.fixture
async def admin(worker: Any) -> AsyncIterator[Admin]:
    stopping = asyncio.Event()
    settings = load_settings({"batch_window_ms": 7}, environ={})
    server = build_admin_server(settings, worker.state, Control(stopping.set, stopping.is_set))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Admin(admin_pb2_grpc.AdminServiceStub(channel), worker, stopping)
    await server.stop(None)


async def status_of(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(call.read() if hasattr(call, "read") else call, 20)
    code: grpc.StatusCode = caught.value.code()
    return code


async def is_ready(worker: Any) -> bool:
    answer = await worker.health.Check(health_pb2.HealthCheckRequest(service="readiness"))
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def test_drain_refuses_new_jobs_lets_running_ones_go_on_and_can_be_undone(
    admin: Admin, request_of: Request
) -> None:
    worker = admin.worker
    running = worker.stub.Execute(request_of("running"))
    job = await worker.submitted()
    for _ in range(2):  # idempotent
        assert (await admin.stub.Drain(pb.DrainRequest())).live == 1
    assert not await is_ready(worker)
    assert await status_of(worker.stub.Execute(request_of("new"))) is grpc.StatusCode.UNAVAILABLE
    waiting = asyncio.ensure_future(_drain(admin))
    while job.live:
        job.step()
    kinds = [event.WhichOneof("event") async for event in running]
    assert kinds[-1] == "end"
    assert (await asyncio.wait_for(waiting, 20)).live == 0

    assert (await admin.stub.Undrain(pb.UndrainRequest())).admitting
    assert await is_ready(worker)
    worker.fake.eager = True
    again = [event.WhichOneof("event") async for event in worker.stub.Execute(request_of("new"))]
    assert again[-1] == "end"


async def _drain(admin: Admin) -> pb.DrainResponse:
    response: pb.DrainResponse = await admin.stub.Drain(pb.DrainRequest(wait_ms=20_000))
    return response


async def test_a_drain_does_not_wait_longer_than_it_was_told(admin: Admin, request_of: Request) -> None:
    call = admin.worker.stub.Execute(request_of("running"))
    await admin.worker.submitted()
    assert (await asyncio.wait_for(admin.stub.Drain(pb.DrainRequest(wait_ms=50)), 20)).live == 1
    call.cancel()


async def test_shutdown_begins_what_a_signal_begins_and_then_nothing_is_undone(admin: Admin) -> None:
    assert (await admin.stub.Shutdown(pb.ShutdownRequest())).drain_seconds == 30
    assert admin.stopping.is_set()
    assert await status_of(admin.stub.Undrain(pb.UndrainRequest())) is grpc.StatusCode.UNAVAILABLE


async def test_the_batch_window_takes_effect_at_once_and_can_be_reset(admin: Admin) -> None:
    changed = await admin.stub.SetBatchWindow(pb.SetBatchWindowRequest(window_ms=250))
    assert (changed.previous_ms, changed.window_ms) == (0, 250)
    assert admin.worker.fake.batch_window_ms == 250
    assert (await admin.stub.GetBatchWindow(pb.GetBatchWindowRequest())).window_ms == 250
    assert (await admin.stub.SetBatchWindow(pb.SetBatchWindowRequest(reset=True))).window_ms == 7


@pytest.mark.parametrize(
    "fields", [{}, {"window_ms": 0}, {"window_ms": 1001}, {"window_ms": 2**32 - 1}, {"reset": False}]
)
async def test_a_batch_window_out_of_bounds_is_refused(admin: Admin, fields: dict[str, Any]) -> None:
    call = admin.stub.SetBatchWindow(pb.SetBatchWindowRequest(**fields))
    assert await status_of(call) is grpc.StatusCode.INVALID_ARGUMENT
    assert admin.worker.fake.batch_window_ms == 0


async def test_the_cache_is_listed_and_cleared(admin: Admin) -> None:
    admin.worker.fake.state.cached_blocks = 12
    listed = await admin.stub.ListCache(pb.ListCacheRequest())
    assert [(share.salt_digest, share.cached_blocks) for share in listed.shares] == [("", 12)]
    assert listed.free_blocks + listed.used_blocks + listed.cached_blocks == listed.total_blocks == 100
    assert listed.finding == ""
    assert (await admin.stub.ClearCache(pb.ClearCacheRequest())).blocks == 12
    assert not (await admin.stub.ListCache(pb.ListCacheRequest())).shares


async def test_the_configuration_in_force_is_shown(admin: Admin) -> None:
    shown = {setting.name: setting for setting in (await admin.stub.GetConfig(pb.GetConfigRequest())).settings}
    assert set(shown) == set(Settings.model_fields)
    assert (shown["batch_window_ms"].value_json, shown["batch_window_ms"].is_default) == ("7", False)
    assert json.loads(shown["host"].value_json) == "127.0.0.1"
    assert shown["host"].is_default


def test_a_secret_is_masked_and_a_file_of_secrets_is_named() -> None:
    class WithSecrets(Settings):
        api_key: str = ""
        api_keys_file: str = ""
        hub_token: str = ""

    shown = {name: value for name, value, _ in shown_settings(WithSecrets(api_key="s3cret", api_keys_file="keys.txt"))}
    assert (shown["api_key"], shown["api_keys_file"], shown["hub_token"]) == (MASK, "keys.txt", "")


async def test_before_the_model_is_loaded_the_engine_cannot_be_asked(start_worker: Any) -> None:
    worker = await start_worker(ready=False)
    server = build_admin_server(load_settings(environ={}), worker.state, Control(lambda: None, lambda: False))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        for call in (stub.Drain(pb.DrainRequest()), stub.ListCache(pb.ListCacheRequest())):
            assert await status_of(call) is grpc.StatusCode.UNAVAILABLE
        assert (await stub.GetConfig(pb.GetConfigRequest())).settings
    await server.stop(None)
