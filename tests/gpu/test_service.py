"""The whole gRPC service over a GPU with the real model: what tests/service/test_real_engine.py holds a CPU to, and
what Health says of the device (W-10, W-44)."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest

from service.device_failures import Start, answer, digest, job
from service.test_real_engine import (  # noqa: F401 - the fixtures and tests of that file, run here on the GPU
    TEXT,
    RealWorker,
    model,
    real,
    rest,
    test_a_chat_is_answered_and_stops_by_itself_or_by_count,
    test_a_stop_string_ends_the_text_before_it,
    test_a_storm_of_cancels_and_disconnects_leaks_nothing,
    test_cancel_in_prefill_and_in_decode_frees_everything,
    test_neighbours_do_not_change_my_bytes,
    test_the_stream_is_whole_ordered_and_accounted_for,
)
from tokenwire.models import resolve
from tokenwire.v1 import inference_pb2 as pb

pytestmark = pytest.mark.gpu

MIB = 2**20


@pytest.fixture(scope="module")
def device() -> str:
    return "cuda:0"


def device_memory_used_mib() -> int:
    """Of all processes, as the driver's own tool counts it."""
    command = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout)


async def test_health_shows_the_device_and_its_memory_by_purpose(start: Start) -> None:
    before_mib = device_memory_used_mib()
    path = resolve("smollm2", fetch=True)
    worker = await start("real", model=str(path), device="cuda", kv_cache_size_mb=4096, residency_check_sec=0.2)
    await worker.connect()
    await asyncio.sleep(0.5)
    health = await worker.stub.Health(pb.HealthRequest())
    assert (health.status, health.phase, health.load_percent) == (pb.HealthResponse.STATUS_HEALTHY, "ready", 100)
    assert (health.device, health.resident) == ("cuda:0", True)
    assert health.sm >= 80
    assert health.device_name.startswith("NVIDIA")
    assert health.cuda_runtime_version.split(".")[0].isdigit()
    memory = health.memory
    assert 90 * MIB < memory.weight_bytes < 2 * path.stat().st_size
    assert 4095 * MIB < memory.kv_bytes <= 4096 * MIB
    assert memory.workspace_bytes > 0
    assert health.vram_bytes_used == memory.weight_bytes + memory.kv_bytes + memory.workspace_bytes
    # The driver's own count: what Health names is on the device, not elsewhere.
    assert device_memory_used_mib() - before_mib >= health.vram_bytes_used // MIB
    assert health.HasField("residency_age_seconds")
    percents = [line["percent"] for line in worker.lines if line["event"] == "model_load_progress"]
    assert percents == [0, 25, 50, 75, 100]


async def test_a_deadline_stops_the_job_in_the_engine(real: RealWorker) -> None:  # noqa: F811
    call = real.stub.Execute(pb.ExecuteRequest(job_id="a", prompt=TEXT, temperature=0), timeout=0.15)
    events, code = await rest(call)
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert len(events) > 5
    await real.assert_idle_and_balanced()


async def all_digests(worker: Any, requests: dict[str, pb.ExecuteRequest], together: bool) -> dict[str, str]:
    if together:
        results = await asyncio.gather(*(answer(worker, request) for request in requests.values()))
    else:
        results = [await answer(worker, request) for request in requests.values()]
    return {name: digest(events) for name, (events, _) in zip(requests, results, strict=True)}


async def test_bytes_over_grpc_do_not_depend_on_company_chunks_or_cache(start: Start) -> None:
    """W-42 through the wire: alone, among 47 others, in small chunks, with a pool that preempts, cold and warm."""
    path = str(resolve("smollm2", fetch=True))
    sampling: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.9, "top_p": 0.95},
        {"temperature": 1.2, "top_k": 40, "repetition_penalty": 1.2},
        {"temperature": 0.7, "min_p": 0.05, "frequency_penalty": 0.3, "logprobs": 3},
    ]
    requests = {
        f"job-{i}": job(f"job-{i}", 5 + 41 * i % 400, max_tokens=32, seed=i, logit_bias={}, **sampling[i % 4])
        for i in range(48)
    }
    whole = await start("real", model=path, device="cuda")
    await whole.connect()
    alone = await all_digests(whole, requests, together=False)
    assert len(set(alone.values())) > 40
    assert await all_digests(whole, requests, together=True) == alone  # their prefixes are cached now
    whole.process.terminate()
    assert await whole.exit_status() == 0

    tight = {"kv_cache_size_mb": 24, "max_batch_tokens": 64, "prefix_cache": False}
    small = await start("real", model=path, device="cuda", **tight)
    await small.connect()
    assert await all_digests(small, requests, together=True) == alone


async def test_a_drained_worker_gives_the_device_back(start: Start, tmp_path: Path) -> None:
    before_mib = device_memory_used_mib()
    worker = await start("real", model=str(resolve("smollm2", fetch=True)), device="cuda", kv_cache_size_mb=2048)
    await worker.connect()
    assert device_memory_used_mib() - before_mib >= 2048
    worker.process.terminate()
    assert await worker.exit_status() == 0
    assert device_memory_used_mib() - before_mib < 512
