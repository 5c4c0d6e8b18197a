"""`POST /shutdown`: 202 and a drain, for operators alone (W-50)."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from service.helpers_gateway import body
from service.helpers_security import bearer, save
from service.worker_process import spawn
from tokenwire.observe.refusals import MAX_LINES_PER_SECOND
from tokenwire.security.keys import create_key
from tokenwire.security.principal import Scope
from tokenwire.v1 import admin_pb2, admin_pb2_grpc


async def post(process: Any, key: str = "") -> httpx.Response:
    port = next(line["http_port"] for line in process.lines if line["event"] == "ready")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(trust_env=False, timeout=20) as http:
        return await http.post(f"http://127.0.0.1:{port}/shutdown", headers=headers)


async def test_without_keys_it_takes_an_admin_port(start: Any) -> None:
    process = await start("eager", http_port=0)
    await process.connect()
    refused = await post(process)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "PERMISSION_DENIED")

    process = await start("eager", http_port=0, admin_port=0)
    await process.connect()
    assert (await post(process)).status_code == 202
    assert await process.exit_status() == 0
    order = [event for event in process.events() if event in ("admin", "drain_start", "drain_end", "shutdown")]
    assert order == ["admin", "drain_start", "drain_end", "shutdown"]


async def test_with_keys_both_ways_take_the_scope_admin(start: Any, tmp_path: Path) -> None:
    user, admin = create_key("user"), create_key("admin", frozenset(Scope))
    file = save(tmp_path / "keys.json", user, admin)
    process = await start("eager", http_port=0, admin_port=0, api_keys_file=str(file))
    ready = await process.log_line("ready")
    assert (await post(process)).status_code == 401
    assert (await post(process, user.text)).status_code == 403

    async with grpc.aio.insecure_channel(f"127.0.0.1:{ready['admin_port']}") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        for key, status in (("", "UNAUTHENTICATED"), (user.text, "PERMISSION_DENIED")):
            metadata = (("authorization", f"Bearer {key}"),) if key else ()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ClearCache(admin_pb2.ClearCacheRequest(), metadata=metadata)
            assert caught.value.code().name == status
        metadata = (("authorization", f"Bearer {admin.text}"),)
        config = await stub.GetConfig(admin_pb2.GetConfigRequest(), metadata=metadata)
        assert "api_keys_file" in {setting.name for setting in config.settings}
        assert admin.text not in str(config)

    assert (await post(process, admin.text)).status_code == 202
    assert await process.exit_status() == 0


async def test_a_gateway_cut_short_by_a_second_signal_tells_all_its_refusals(start: Any, tmp_path: Path) -> None:
    key = create_key("user")
    worker = await start("held")
    target = f"127.0.0.1:{(await worker.log_line('ready'))['port']}"
    keys = str(save(tmp_path / "keys.json", key))
    flags = ("--target", target, "--http-port", "0", "--api-keys-file", keys, "--log-format", "json")
    gateway = await spawn(sys.executable, "-m", "tokenwire", "gateway", *flags)
    calls = 4 * MAX_LINES_PER_SECOND
    try:
        url = f"http://127.0.0.1:{(await gateway.log_line('listening'))['http_port']}/execute"
        await gateway.log_line("worker_ready")
        async with (
            httpx.AsyncClient(trust_env=False, timeout=20) as http,
            http.stream("POST", url, json=body(), headers=bearer(key)) as held,
        ):
            assert held.status_code == 200
            for _ in range(calls):
                assert (await http.post(url, json=body())).status_code == 401
            gateway.process.send_signal(signal.SIGTERM)
            await gateway.log_line("drain_start")
            gateway.process.send_signal(signal.SIGTERM)
            assert await gateway.exit_status() == 0
    finally:
        await gateway.close()
    refused = [line for line in gateway.lines if line["event"] == "refused"]
    assert sum(line.get("left_out", 1) for line in refused) == calls
