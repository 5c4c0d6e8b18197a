"""Whole models on the GPU: against the CPU backend, against the golden logits, and alone against in company."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tokenwire import _native
from unit.gguf_builder import FLOAT32, UINT32, kv, tiny_llama, tiny_vocabulary

pytestmark = pytest.mark.gpu

BLOCK_FORMATS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
K_FORMATS = ["Q4_K", "Q5_K", "Q6_K"]


def options(device: str, **settings: Any) -> _native.EngineOptions:
    result = _native.EngineOptions()
    result.device = device
    for name, value in settings.items():
        setattr(result, name, value)
    return result


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def forward(runner: _native.Runner, sequence: int, ids: list[int]) -> npt.NDArray[np.float32]:
    data = runner.forward(sequence, ids, all_logits=True)
    logits = np.frombuffer(data, np.float32).reshape(len(ids), -1)
    assert np.isfinite(logits).all()
    return logits


def random_ids(count: int, vocab: int, seed: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(3, vocab, count)]


def check_agreement(path: Path, vocab: int, tokens: int = 300) -> None:
    ids = random_ids(tokens, vocab, seed=1)
    cpu = log_softmax(forward(_native.Runner(_native.GgufFile(str(path)), options("cpu")), 0, ids))
    gpu = log_softmax(forward(_native.Runner(_native.GgufFile(str(path)), options("cuda")), 0, ids))
    assert np.abs(cpu - gpu).mean() < 0.02
    assert (cpu.argmax(axis=1) == gpu.argmax(axis=1)).mean() > 0.97


@pytest.mark.parametrize("dtype", BLOCK_FORMATS)
def test_cpu_and_gpu_agree(tmp_path: Path, dtype: str) -> None:
    model = tiny_llama(tmp_path / "model.gguf", dtype=dtype, n_layers=3, context=512)
    check_agreement(model.path, model.vocab_size)


@pytest.mark.parametrize("dtype", K_FORMATS)
def test_cpu_and_gpu_agree_on_k_formats(tmp_path: Path, dtype: str) -> None:
    model = tiny_llama(tmp_path / "model.gguf", dtype=dtype, n_embd=256, n_heads=4, n_ff=512, context=512)
    check_agreement(model.path, model.vocab_size)


def mixed_model(path: Path, shape: str) -> int:
    """A model in Q4_K_M, and the size of its vocabulary."""
    from benchmarks.make_model import SHAPES, write_model

    with path.open("wb") as file:
        write_model(file, shape, "q4_k_m", seed=0)
    return SHAPES[shape].vocab_size


@pytest.mark.parametrize("shape", ["tiny", "tiny-256"])
def test_cpu_and_gpu_agree_where_q_k_and_v_have_different_formats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    """Beside Q5_0, v is Q8_0 in some layers, which the GPU keeps as one Q8_0 matrix; beside Q4_K it is Q6_K."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    path = tmp_path / "model.gguf"
    check_agreement(path, mixed_model(path, shape))


@pytest.mark.parametrize(
    "shape",
    [
        {"n_heads": 4, "n_kv_heads": 4},
        {"n_heads": 10, "n_kv_heads": 1, "head_dim": 32},
        {"n_heads": 9, "n_kv_heads": 3, "head_dim": 64, "n_embd": 96},
        {"n_heads": 2, "n_kv_heads": 1, "head_dim": 128},
        {"n_heads": 2, "n_kv_heads": 2, "head_dim": 96, "tied": False},
        {"vocab": 1001, "n_ff": 160},
        {"extra_keys": (kv("llama.rope.dimension_count", UINT32, 8), kv("llama.rope.freq_base", FLOAT32, 500.0))},
    ],
    ids=str,
)
def test_cpu_and_gpu_agree_on_odd_shapes(tmp_path: Path, shape: dict[str, Any]) -> None:
    model = tiny_llama(tmp_path / "model.gguf", dtype="Q8_0", context=512, **shape)
    check_agreement(model.path, model.vocab_size)


@pytest.mark.parametrize("dtype", ["BF16", "Q8_0", "Q4_K"])
def test_cpu_and_gpu_agree_on_qwen2(tmp_path: Path, dtype: str) -> None:
    """Biases of q, k and v, and rotation of half-split pairs, with six query heads to a KV head."""
    shape: dict[str, Any] = {"n_embd": 512, "n_heads": 12, "n_kv_heads": 2, "head_dim": 64, "n_ff": 768}
    model = tiny_llama(tmp_path / "model.gguf", architecture="qwen2", dtype=dtype, context=512, rope_base=1e6, **shape)
    check_agreement(model.path, model.vocab_size)


HEADS = ((1, 16), (2, 16), (8, 16), (2, 32), (1, 64), (2, 64), (8, 64), (2, 96), (2, 128), (8, 128))


# Heads of 64 and 128 have kernels of their own for prefill on Hopper.
@pytest.mark.parametrize(("kv_heads", "head_dim"), HEADS)
def test_logits_do_not_depend_on_company_or_chunks(tmp_path: Path, kv_heads: int, head_dim: int) -> None:
    heads = {"n_heads": 8, "n_kv_heads": kv_heads, "head_dim": head_dim}
    model = tiny_llama(tmp_path / "model.gguf", dtype="Q4_0", n_embd=128, n_ff=256, context=1024, **heads)
    check_company_and_chunks(model.path, model.vocab_size)


def test_nor_do_they_where_the_products_of_q_k_and_v_run_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    path = tmp_path / "model.gguf"
    check_company_and_chunks(path, mixed_model(path, "tiny-256"))


def check_company_and_chunks(path: Path, vocab: int) -> None:
    file = _native.GgufFile(str(path))
    runner = _native.Runner(file, options("cuda", max_batch_tokens=512, kv_cache_bytes=1 << 30))
    ids = random_ids(400, vocab, seed=2)
    whole = forward(runner, 0, ids)
    for chunk in (1, 7, 16, 64, 130, 257):
        runner.reset()
        parts = [forward(runner, 0, ids[i : i + chunk]) for i in range(0, len(ids), chunk)]
        assert (np.concatenate(parts).view(np.uint32) == whole.view(np.uint32)).all(), chunk
    for streams in (1, 2, 5, 8, 9, 30, 64, 100, 256):
        runner.reset()
        for stream in range(streams):
            runner.forward(stream, ids[: 100 + 7 * (stream % 20)])
        for step in range(3):
            expected = [whole[100 + 7 * (stream % 20) + step] for stream in range(streams)]
            next_ids = [ids[100 + 7 * (stream % 20) + step] for stream in range(streams)]
            data = runner.forward_batch(list(range(streams)), next_ids)
            actual = np.frombuffer(data, np.float32).reshape(streams, -1)
            assert (actual.view(np.uint32) == np.stack(expected).view(np.uint32)).all(), (streams, step)


def settings_of(index: int) -> dict[str, Any]:
    """Sampling of every kind, chosen by the job's number."""
    base: dict[str, Any] = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "logprobs": -1,
    }
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {},
        {"temperature": 0.7, "top_p": 0.9},
        {"top_k": 5},
        {"min_p": 0.1, "temperature": 1.5},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": -0.2, "top_k": 20, "top_p": 0.8},
        {"logit_bias": {5: 3.0, 9: -100.0}, "logprobs": 5},
        {"temperature": 0.0, "repetition_penalty": 1.5, "logprobs": 0},
    ]
    return {**base, **kinds[index % len(kinds)]}


def run_jobs(engine: _native.Engine, jobs: list[tuple[int, list[int]]], max_tokens: int) -> dict[int, tuple[str, int]]:
    """Digest and number of tokens of each job, all running at once."""
    waiting = {
        index: engine.submit(
            job_id=f"job-{index}",
            model="tiny",
            prompt_ids=ids,
            max_tokens=max_tokens,
            stop=[],
            seed=1000 + index,
            timeout_ms=0,
            cache_salt=b"",
            **settings_of(index),
        )
        for index, ids in jobs
    }
    found: dict[int, tuple[str, int]] = {}
    deadline = time.monotonic() + 60
    while waiting:
        assert time.monotonic() < deadline
        for index, job in [*waiting.items()]:
            outcome = job.take()[1]
            if outcome is not None:
                assert outcome.error_code == "", outcome.error_message
                found[index] = (outcome.digest, outcome.tokens_out)
                del waiting[index]
        time.sleep(0.0005)
    return found


def make_engine(path: Path, vocab: int, device: str = "cuda", **settings: Any) -> _native.Engine:
    file = _native.GgufFile(str(path))
    return _native.Engine(file, [b"x"] * vocab, [], options(device, max_undelivered_tokens=4096, **settings))


@pytest.mark.parametrize("count", [64, 256])
def test_every_job_in_a_crowd_equals_itself_alone(tmp_path: Path, count: int) -> None:
    model = tiny_llama(tmp_path / "model.gguf", dtype="Q4_1", n_embd=128, n_heads=8, n_ff=256, context=512)
    jobs = [(i, random_ids(5 + 13 * i % 180, model.vocab_size, seed=i)) for i in range(count)]
    crowd = make_engine(model.path, model.vocab_size, max_batch_tokens=384, max_running_jobs=count)
    together = run_jobs(crowd, jobs, max_tokens=24)
    assert crowd.stats().last_batch_size >= 1
    assert crowd.audit() == ""
    single = make_engine(model.path, model.vocab_size, max_batch_tokens=64, max_running_jobs=1, prefix_cache=False)
    alone: dict[int, tuple[str, int]] = {}
    for job in jobs:
        alone.update(run_jobs(single, [job], max_tokens=24))
    assert [index for index in together if together[index] != alone[index]] == []
    assert len({digest for digest, _ in together.values()}) > count // 2


def test_a_tiny_pool_and_its_preemptions_change_nothing(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model.gguf", dtype="Q8_0", context=512)
    jobs = [(i, random_ids(20 + 11 * i, model.vocab_size, seed=50 + i)) for i in range(12)]
    kv_bytes = 2 * 2 * 16 * 4 * 16  # bytes a block: 2 layers, 2 kv heads, 16 dims, 16 tokens
    roomy = run_jobs(make_engine(model.path, model.vocab_size), jobs, max_tokens=40)
    tight_engine = make_engine(model.path, model.vocab_size, kv_cache_bytes=30 * kv_bytes)
    tight = run_jobs(tight_engine, jobs, max_tokens=40)
    assert tight_engine.stats().num_preemptions > 0
    assert tight == roomy


def frequencies(engine: _native.Engine, draws: int, **changes: Any) -> npt.NDArray[np.float64]:
    """How often each token is drawn first after one prompt, over many seeds."""
    jobs = [
        engine.submit(
            job_id=f"draw-{seed}",
            model="tiny",
            prompt_ids=[7, 8, 9],
            max_tokens=1,
            stop=[],
            seed=seed,
            timeout_ms=0,
            cache_salt=b"",
            **{**settings_of(1), "logprobs": 0, **changes},
        )
        for seed in range(draws)
    ]
    counts = np.zeros(engine.model_info.vocab_size)
    deadline = time.monotonic() + 100
    for job in jobs:
        messages: list[bytes] = []
        outcome = None
        while outcome is None:
            assert time.monotonic() < deadline
            more, outcome = job.take()
            messages += more
            time.sleep(0)
        assert outcome.error_code == ""
        counts[first_token(messages)] += 1
    return counts / draws


def first_token(messages: list[bytes]) -> int:
    from tokenwire.v1 import inference_pb2 as pb

    events = [pb.ExecuteEvent.FromString(message) for message in messages]
    return next(event.token.ids[0] for event in events if event.WhichOneof("event") == "token")


def nucleus(probability: npt.NDArray[np.float64], mass: float) -> npt.NDArray[np.float64]:
    """The most probable tokens up to the one with which they reach the mass; the others are zero."""
    descending = np.sort(probability)[::-1]
    least = descending[np.searchsorted(np.cumsum(descending), mass)]
    return np.where(probability >= least, probability, 0)


@pytest.mark.parametrize(
    ("changes", "keep"),
    [
        ({}, lambda p: p),
        ({"top_k": 7}, lambda p: np.where(p >= np.sort(p)[-7], p, 0)),
        ({"min_p": 0.3}, lambda p: np.where(p >= 0.3 * p.max(), p, 0)),
        (
            {"top_p": 0.5},
            lambda p: np.where(p >= np.sort(p)[::-1][np.searchsorted(np.cumsum(np.sort(p)[::-1]), 0.5)], p, 0),
        ),
        ({"temperature": 0.5}, lambda p: p**2),
        ({"logit_bias": {20: 4.0}}, lambda p: p * np.where(np.arange(len(p)) == 20, np.exp(4.0), 1)),
    ],
    ids=["plain", "top_k", "min_p", "top_p", "temperature", "bias"],
)
def test_draws_follow_the_distribution(
    tmp_path: Path, changes: dict[str, Any], keep: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]
) -> None:
    model = tiny_llama(tmp_path / "model.gguf", dtype="F32", n_layers=1)
    runner = _native.Runner(_native.GgufFile(str(model.path)), options("cuda"))
    probability = np.exp(log_softmax(forward(runner, 0, [7, 8, 9])[-1]))
    expected = keep(probability)
    expected /= expected.sum()
    draws = 3000
    engine = make_engine(model.path, model.vocab_size, max_queued_jobs=draws, max_running_jobs=128)
    found = frequencies(engine, draws, **changes)
    assert (found[expected == 0] == 0).all()
    # Total variation of an empirical distribution is about √(support / draws).
    assert np.abs(found - expected).sum() / 2 < np.sqrt((expected > 0).sum() / draws)


def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model.gguf")
    with pytest.raises(_native.EngineError, match="cuda:99") as error:
        _native.Runner(_native.GgufFile(str(model.path)), options("cuda:99"))
    assert error.value.code == "UNAVAILABLE"


def test_a_pool_that_cannot_fit_names_required_and_available(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model.gguf")
    with pytest.raises(
        _native.EngineError,
        match=r"the KV pool does not fit: required 1099511627776 bytes, available \d+ bytes on cuda:0",
    ) as error:
        _native.Runner(_native.GgufFile(str(model.path)), options("cuda", kv_cache_bytes=1 << 40))
    assert error.value.code == "INSUFFICIENT_VRAM"
    # The device is none the worse for it.
    forward(_native.Runner(_native.GgufFile(str(model.path)), options("cuda")), 0, [1, 2, 3])


def test_memory_is_counted_and_given_back(tmp_path: Path) -> None:
    tokens, _, _ = tiny_vocabulary()
    model = tiny_llama(tmp_path / "model.gguf", dtype="Q8_0")
    engine = make_engine(model.path, len(tokens), kv_cache_bytes=1 << 20)
    stats = engine.stats()
    assert stats.kv_bytes <= 1 << 20
    assert stats.weight_bytes > 0
    assert stats.workspace_bytes > 0
