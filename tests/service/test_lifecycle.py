"""The worker as a process: start, load, drain, failure, and the exit status of each."""

from __future__ import annotations

import json
import signal
import socket
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from service.worker_process import kinds, next_event, rest
from tokenwire.v1 import inference_pb2 as pb


async def test_a_worker_starts_serves_and_drains_with_status_0(start: Any) -> None:
    worker = await start("eager")
    await worker.connect()
    assert [line["percent"] for line in worker.lines if line["event"] == "model_load_progress"] == [0, 25, 50, 75, 100]
    call = worker.stub.Execute(pb.ExecuteRequest(job_id="a", prompt="the secret prompt"))
    assert kinds(await rest(call)) == ["started", "token", "metrics", "end"]
    worker.process.send_signal(signal.SIGTERM)
    assert await worker.exit_status() == 0
    order = ["startup", "model_load_start", "model_load_complete", "ready"]
    order += ["execute_start", "execute_end", "drain_start", "drain_end", "shutdown"]
    assert [event for event in worker.events() if event in order] == order
    end = next(line for line in worker.lines if line["event"] == "execute_end")
    for key in ("worker_id", "job_id", "model", "device", "correlation_id", "tokens_out", "decode_ms"):
        assert key in end, key
    assert "secret" not in json.dumps(worker.lines)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_drain_refuses_new_jobs_lets_health_answer_and_ends_survivors(start: Any, number: signal.Signals) -> None:
    worker = await start("held", drain_seconds=1.0)
    await worker.connect()
    call = worker.stub.Execute(pb.ExecuteRequest(job_id="a", prompt="x"))
    assert (await next_event(call)).HasField("started")
    watch = worker.health.Watch(health_pb2.HealthCheckRequest(service="readiness"))
    assert (await next_event(watch)).status == health_pb2.HealthCheckResponse.SERVING
    worker.process.send_signal(number)
    assert (await next_event(watch)).status == health_pb2.HealthCheckResponse.NOT_SERVING

    health = await worker.stub.Health(pb.HealthRequest())
    assert (health.phase, health.status) == ("draining", pb.HealthResponse.STATUS_UNHEALTHY)
    live = await worker.health.Check(health_pb2.HealthCheckRequest(service="liveness"))
    assert live.status == health_pb2.HealthCheckResponse.SERVING
    refused = worker.stub.Execute(pb.ExecuteRequest(job_id="b", prompt="x"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await refused.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    events = await rest(call)
    assert kinds(events)[-2:] == ["metrics", "error"]
    assert (events[-1].error.code, events[-1].error.retriable) == ("UNAVAILABLE", True)
    assert await call.code() is grpc.StatusCode.UNAVAILABLE
    assert await worker.exit_status() == 0


async def test_a_drain_refuses_calls_for_as_long_as_balancers_need_to_know(start: Any) -> None:
    worker = await start("eager", drain_notice_seconds=1.0)
    await worker.connect()
    worker.process.send_signal(signal.SIGTERM)
    await worker.log_line("drain_start")
    began = time.monotonic()
    refusals = 0
    while time.monotonic() < began + 0.8:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await worker.stub.Execute(pb.ExecuteRequest(job_id="a", prompt="x")).read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        refusals += 1
    assert refusals > 1
    assert await worker.exit_status() == 0


async def test_a_second_signal_ends_the_drain_at_once(start: Any) -> None:
    worker = await start("held", drain_seconds=3600.0)
    await worker.connect()
    call = worker.stub.Execute(pb.ExecuteRequest(job_id="a", prompt="x"))
    await next_event(call)
    worker.process.send_signal(signal.SIGTERM)
    await worker.log_line("drain_start")
    worker.process.send_signal(signal.SIGTERM)
    assert kinds(await rest(call))[-1] == "error"
    assert await worker.exit_status() == 0
    assert next(line for line in worker.lines if line["event"] == "drain_end")["cut_short"] is True


async def test_while_loading_health_answers_and_jobs_are_unavailable(start: Any) -> None:
    worker = await start("slow-load")
    await worker.connect("listening")
    await worker.log_line("model_load_progress")
    health = await worker.stub.Health(pb.HealthRequest())
    assert (health.phase, health.load_percent) == ("loading", 25)
    expected = {"": 2, "readiness": 2, "startup": 2, "tokenwire.v1.Inference": 2, "liveness": 1}
    for service, status in expected.items():
        response = await worker.health.Check(health_pb2.HealthCheckRequest(service=service))
        assert response.status == status, service
    call = worker.stub.Execute(pb.ExecuteRequest(job_id="a", prompt="x"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert dict(await call.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
    worker.process.send_signal(signal.SIGTERM)
    assert await worker.exit_status() == 0


@pytest.mark.parametrize("scenario", ["dies", "hangs"])
async def test_a_dead_engine_ends_every_stream_and_the_process(start: Any, scenario: str) -> None:
    worker = await start(scenario)
    await worker.connect()
    call = worker.stub.Execute(pb.ExecuteRequest(job_id="a", prompt="x"))
    assert kinds(await rest(call))[-1] == "error"
    assert await call.code() is grpc.StatusCode.INTERNAL
    assert await worker.exit_status() == 70


@pytest.mark.parametrize(("scenario", "status"), [("bad-model", 1), ("no-device", 69)])
async def test_a_worker_that_cannot_load_says_why_in_one_line(start: Any, scenario: str, status: int) -> None:
    worker = await start(scenario)
    assert await worker.exit_status() == status
    errors = [line for line in worker.lines if line["level"] == "error"]
    assert len(errors) == 1
    assert "\n" not in errors[0]["message"]


@pytest.mark.parametrize(
    ("content", "flags", "status", "code"),
    [
        (b"", {}, 1, "MODEL_LOAD_FAILED"),
        (b"PK\x03\x04 not a model", {}, 1, "MODEL_LOAD_FAILED"),
        (b"GGUF" + b"\xff" * 60, {}, 1, "UNSUPPORTED_MODEL"),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 60, {}, 1, "MODEL_LOAD_FAILED"),
        (None, {}, 1, "MODEL_LOAD_FAILED"),
        (b"", {"device": "cuda:0"}, 69, "NO_DEVICE"),
    ],
    ids=["empty", "zip", "version", "counts", "absent", "no-cuda"],
)
async def test_what_cannot_be_loaded_is_one_clear_line(
    start: Any, tmp_path: Path, content: bytes | None, flags: dict[str, object], status: int, code: str
) -> None:
    file = tmp_path / "model.gguf"
    if content is not None:
        file.write_bytes(content)
    worker = await start("real", model=str(file), **flags)
    assert await worker.exit_status() == status
    errors = [line for line in worker.lines if line["level"] == "error"]
    assert [line["code"] for line in errors] == [code]
    assert errors[0]["message"]
    assert "\n" not in errors[0]["message"]


async def test_a_port_in_use_is_status_71(start: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        worker = await start("eager", port=taken.getsockname()[1])
        assert await worker.exit_status() == 71
    errors = [line for line in worker.lines if line["level"] == "error"]
    assert [line["code"] for line in errors] == ["CANNOT_BIND"]
