"""The determinism gate on the GPU (W-42): the load of e2e/test_determinism.py with up to 256 streams, every byte and
log-probability compared with the same request alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from e2e.helpers import Answer, Transcript, make_engine, run_alone, say
from e2e.helpers_gate import CONTEXT, Setting, make_requests, run_gate
from e2e.test_determinism import assert_holds
from service.device_failures import Start
from tokenwire import _native
from tokenwire.v1 import inference_pb2_grpc
from unit.gguf_builder import tiny_llama

pytestmark = pytest.mark.gpu

# The smallest pool holds one longest request, the middle ones preempt, the largest let 256 sequences run together.
SETTINGS = (
    Setting(1, 16, 40, True, 16, run_ahead=False),
    Setting(1, 96, 110, False, 64),
    Setting(1, 300, 700, True, 200),
    Setting(1, 512, 3500, True, 256, least_live=230, run_ahead=False),
    Setting(1, 2048, 3500, False, 256, least_live=230),
)
# Wide enough that every kernel of matrix products has whole tiles; K-quants come in blocks of 256 inputs. Heads of 64
# take the attention that the models in use take.
WIDE = {"n_embd": 256, "n_heads": 8, "n_kv_heads": 2, "head_dim": 64, "n_ff": 768}
STREAMS = 256
# Some of a crowd's jobs have ended, or wait for a slow reader, while others still prefill.
MOST_OF_THE_STREAMS = 128
STREAMS_PER_CONNECTION = 64


@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", ["Q4_1", "BF16", "Q8_0", "Q4_K"])
def test_a_crowd_on_the_gpu_changes_no_byte_of_any_answer(tmp_path: Path, dtype: str) -> None:
    model = tiny_llama(tmp_path / "model.gguf", dtype=dtype, context=CONTEXT, tied=False, **WIDE)
    report = run_gate(_native, model.path, num_requests=1500, seed=11, settings=SETTINGS, device="cuda")
    assert_holds(report)
    assert report.largest_batch > MOST_OF_THE_STREAMS


async def test_256_streams_over_grpc_are_those_of_the_engine_alone(start: Start, tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "model.gguf", dtype="Q4_1", context=CONTEXT, **WIDE).path
    requests = make_requests(STREAMS, seed=21)
    quiet = make_engine(_native, path, device="cuda", prefix_cache=False, max_batch_tokens=256)
    expected = [run_alone(quiet, request) for request in requests]
    quiet.stop()
    worker = await start("real", model=str(path), device="cuda", max_batch_tokens=384)
    await worker.connect()
    channels = [
        grpc.aio.insecure_channel(f"127.0.0.1:{worker.port}", (("grpc.use_local_subchannel_pool", 1),))
        for _ in range(STREAMS // STREAMS_PER_CONNECTION)
    ]
    stubs = [inference_pb2_grpc.InferenceStub(channel) for channel in channels]

    async def execute(stub: Any, number: int, job_id: str) -> Answer:
        transcript = Transcript()
        async for event in stub.Execute(requests[number].message(job_id)):
            transcript.add_event(event)
        return transcript.answer()

    for again in ("cold", "warm"):
        found = await asyncio.gather(*(execute(stubs[i % len(stubs)], i, f"{again}-{i}") for i in range(STREAMS)))
        differing = [i for i, answer in enumerate(expected) if answer != found[i]]
        say(f"{STREAMS} streams over gRPC, {again}: {len(differing)} answers differ")
        assert differing == []
    for channel in channels:
        await channel.close()
    worker.process.terminate()
    assert await worker.exit_status() == 0
