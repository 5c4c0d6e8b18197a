"""The release gate of W-42: nothing but the request itself decides the bytes of its answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from e2e.helpers import Answer, Request, Transcript, make_engine, only_when_asked, run_alone, say, settle
from e2e.helpers_gate import CONTEXT, NO_LIMIT_MS, Report, make_requests, run_crowd, run_gate
from e2e.helpers_mutation import MUTATIONS, MutantBuild, Mutation
from tokenwire import _native
from tokenwire.config_sources import load_settings
from tokenwire.engine import AsyncEngine
from tokenwire.models import resolve
from tokenwire.rpc.server import build_server
from tokenwire.rpc.state import ModelFacts, Phase, Serving, WorkerState
from tokenwire.rpc.validate import Limits
from tokenwire.text import load_text
from tokenwire.v1 import inference_pb2 as pb
from tokenwire.v1 import inference_pb2_grpc
from unit.gguf_builder import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
NATIVE = Path(str(_native.__file__))
ISAS = str(_native.build_info()["isas"]).split()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf", dtype="Q4_1", context=CONTEXT).path


def assert_holds(report: Report) -> None:
    """No byte differs, and the load was one that could have shown a difference."""
    say(
        f"{report.num_requests} requests alone ({report.num_tokens} tokens) against {report.num_comparisons} under "
        f"load: {report.num_bytes} bytes compared, {report.differing} answers differ; {report.num_preemptions} "
        f"preemptions, {report.num_cancelled} neighbours cancelled, {report.num_stalls} stalls, "
        f"{report.num_cached_tokens} cached prompt tokens, {report.largest_batch} sequences or more in a step"
    )
    assert report.differing == 0, report.examples
    assert report.num_comparisons > report.num_requests
    assert report.num_preemptions > 0
    assert report.num_cancelled > 0
    assert report.num_stalls > 0
    assert report.num_cached_tokens > 0
    assert report.largest_batch >= 8
    reasons = {pb.STOP_REASON_EOS, pb.STOP_REASON_MAX_TOKENS, pb.STOP_REASON_STOP_SEQUENCE}
    assert set(report.stop_reasons) == reasons


def test_a_crowd_changes_no_byte_of_any_answer(tiny: Path) -> None:
    assert_holds(run_gate(_native, tiny, num_requests=2100, seed=1))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(100, 104))
def test_a_crowd_changes_no_byte_of_very_many_answers(tiny: Path, seed: int, request: pytest.FixtureRequest) -> None:
    only_when_asked(request)
    assert_holds(run_gate(_native, tiny, num_requests=4000, seed=seed, passes=6))


# Rows of the K-quants are whole super-blocks of 256.
WIDE = {"n_embd": 256, "n_ff": 256}
FORMATS: dict[str, dict[str, int]] = {
    "F32": {},
    "F16": {},
    "BF16": {},
    "Q4_0": {},
    "Q5_0": {},
    "Q5_1": {},
    "Q8_0": {},
    "Q4_K": WIDE,
    "Q5_K": WIDE,
    "Q6_K": WIDE,
}


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_crowd_changes_no_byte_whatever_the_format(tmp_path: Path, dtype: str) -> None:
    shape: dict[str, Any] = FORMATS[dtype]
    model = tiny_llama(tmp_path / "tiny.gguf", dtype=dtype, context=CONTEXT, tied=False, **shape)
    assert_holds(run_gate(_native, model.path, num_requests=150, seed=3))


def run_gate_in_process(native: Path, model: Path, num_requests: int, isa: str = "") -> dict[str, Any]:
    """The report of a small gate on another build, or another instruction set, of the engine."""
    paths = [str(ROOT / "tests"), *(path for path in sys.path if path)]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "e2e.helpers_gate",
            "--native",
            native,
            "--model",
            model,
            "--requests",
            str(num_requests),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TOKENWIRE_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert not isa or report["isa"] == isa
    return report


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != _native.cpu_isa()])
def test_a_crowd_changes_no_byte_on_another_instruction_set(tiny: Path, isa: str) -> None:
    if ISAS.index(isa) > ISAS.index(_native.cpu_isa()):
        pytest.skip(f"this processor has no {isa}")
    report = run_gate_in_process(NATIVE, tiny, 60, isa)
    assert report["differing"] == 0, report["examples"]
    assert report["num_comparisons"] >= 60


# --- The real model. ---


@pytest.fixture(scope="module")
def smollm2() -> Iterator[tuple[Path, list[bytes]]]:
    path = resolve("smollm2", fetch=True)
    text = load_text(_native.GgufFile(str(path)), path)
    yield path, text.vocabulary()
    text.close()


def test_neighbours_change_no_byte_of_a_real_models_answers(smollm2: tuple[Path, list[bytes]]) -> None:
    path, vocabulary = smollm2
    rng = random.Random(5)

    def request() -> Request:
        return Request(
            prompt=tuple(rng.randrange(300, 40000) for _ in range(rng.choice((3, 8, 17, 30, 70)))),
            max_tokens=rng.choice((2, 5, 9)),
            seed=rng.getrandbits(64),
            temperature=rng.choice((0.0, 0.8)),
            repetition_penalty=rng.choice((1.0, 1.2)),
            logprobs=rng.choice((-1, 3)),
        )

    def engine(**options: Any) -> Any:
        return make_engine(_native, path, vocabulary=vocabulary, max_context_tokens=2048, **options)

    requests = [request() for _ in range(60)]
    quiet = engine(num_threads=1, prefix_cache=False, kv_blocks=128)
    alone = [run_alone(quiet, each) for each in requests]
    quiet.stop()
    busy = engine(num_threads=2, max_batch_tokens=64, kv_blocks=40, slow_reader_timeout_ms=NO_LIMIT_MS)
    crowd = run_crowd(busy, requests, seed=6, most_live=17, neighbours=[request() for _ in range(20)])
    busy.stop()
    differing = [i for i, (a, b) in enumerate(zip(alone, crowd.answers, strict=True)) if a != b]
    say(
        f"60 requests of SmolLM2 alone and among 16: {sum(answer.num_bytes for answer in alone)} bytes compared, "
        f"{len(differing)} answers differ; {crowd.num_preemptions} preemptions, {crowd.num_cancelled} cancelled"
    )
    assert differing == []
    assert crowd.num_cancelled > 0


# --- Over gRPC. ---


async def execute(stub: Any, request: Request, job_id: str) -> Answer:
    transcript = Transcript()
    async for event in stub.Execute(request.message(job_id)):
        transcript.add_event(event)
    return transcript.answer()


async def execute_and_cancel(stub: Any, request: Request, job_id: str, num_reads: int) -> None:
    call = stub.Execute(request.message(job_id))
    for _ in range(num_reads):
        await call.read()
    if num_reads % 2:
        await stub.Cancel(pb.CancelRequest(job_id=job_id))
        with contextlib.suppress(grpc.aio.AioRpcError):
            while await call.read() is not grpc.aio.EOF:
                pass
        assert await call.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.OK)
    else:
        call.cancel()


async def test_streams_over_grpc_are_the_same_alone_and_together(tmp_path: Path) -> None:
    # Deep enough that requests arrive faster than they are answered, and gather in the engine.
    deep = tiny_llama(tmp_path / "deep.gguf", dtype="Q4_1", context=CONTEXT, n_layers=8, n_embd=256, n_ff=512).path
    requests = make_requests(100, seed=7)
    neighbours = make_requests(50, seed=8)
    quiet = make_engine(_native, deep, num_threads=1, prefix_cache=False, max_batch_tokens=256)
    expected = [run_alone(quiet, request) for request in requests]
    quiet.stop()

    native = make_engine(_native, deep, kv_blocks=41, num_threads=2, max_batch_tokens=64)
    text = load_text(_native.GgufFile(str(deep)), deep)
    engine = AsyncEngine(native)
    engine.attach()
    info = native.model_info
    limits = Limits(32768, 64, 0, 2048, info.vocab_size, info.context_length, 16)
    facts = ModelFacts(info.name, info.quant_kind, text.kind, info.vocab_size, info.context_length, "cpu")
    state = WorkerState(serving=Serving(engine, text, limits, facts), phase=Phase.READY)
    with ThreadPoolExecutor(2) as pool:
        server = build_server(load_settings(environ={}), state, pool)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            alone = [await execute(stub, request, f"alone-{i}") for i, request in enumerate(requests)]
            open_calls = asyncio.Semaphore(64)  # the server refuses calls beyond 100 on one connection

            async def bounded(call: Awaitable[Answer | None]) -> Answer | None:
                async with open_calls:
                    return await call

            calls: list[Awaitable[Answer | None]] = [
                execute(stub, request, f"together-{i}") for i, request in enumerate(requests)
            ]
            for i, request in enumerate(neighbours):
                calls.insert(3 * i, execute_and_cancel(stub, request, f"other-{i}", i % 6))
            finished = await asyncio.gather(*(bounded(call) for call in calls))
            together = [answer for answer in finished if answer is not None]
        await server.stop(None)
    assert await engine.wait_idle(30)
    num_preemptions = settle(native).num_preemptions
    await engine.close()
    text.close()
    differing = [i for i, answer in enumerate(expected) if not answer == alone[i] == together[i]]
    say(f"100 requests over gRPC, alone and together: {len(differing)} differ; {num_preemptions} preemptions")
    assert differing == []
    assert num_preemptions > 0


# --- The gate itself must be able to fail. ---


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: Path(mutation.file).stem)
def test_each_mutation_still_has_its_place(mutation: Mutation) -> None:
    source = (ROOT / mutation.file).read_text()
    assert mutation.apply(source) != source


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_gate_catches_engines_that_break_the_promise(
    tiny: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    only_when_asked(request)
    build = MutantBuild(tmp_path)
    whole = run_gate_in_process(build.compile(None), tiny, 300)
    assert whole["differing"] == 0, whole["examples"]
    caught = {}
    for mutation in MUTATIONS:
        report = run_gate_in_process(build.compile(mutation), tiny, 300)
        caught[mutation.promise_broken] = report["differing"]
        say(f"{mutation.promise_broken}: {report['differing']} of {report['num_comparisons']} answers differ")
    assert all(caught.values()), caught
