"""A scripted load on a real worker: every metric that it should move moves, by what the client counted (A-4)."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from e2e.helpers import wait_until
from e2e.helpers_metrics import changes, parse, scrape
from e2e.helpers_server import running_worker
from tokenwire.observe import metrics as declared
from tokenwire.v1 import inference_pb2 as pb
from tokenwire.v1 import inference_pb2_grpc
from unit.gguf_builder import tiny_llama

# Without named sessions, and with one model for the life of the process, these cannot move.
STILL = {"tokenwire_agents_active", "tokenwire_model_swap_duration_seconds", "tokenwire_cache_persist_duration_seconds"}


@dataclass
class Count:
    """What a client saw."""

    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answers: int = 0
    first_token_s: list[float] = field(default_factory=list)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, int]]:
    """A stub of a worker with a small KV pool, and the port of its metrics."""
    path = tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf", dtype="Q4_1", context=16384, n_layers=2).path
    port = free_port()
    flags = (
        "--metrics-port",
        str(port),
        "--kv-cache-size-mb",
        "2",
        "--max-tokens-out",
        "8000",
        "--num-threads",
        "1",
        "--max-running-jobs",
        "4",
    )
    with running_worker(path, *flags) as target, grpc.insecure_channel(target) as channel:
        yield inference_pb2_grpc.InferenceStub(channel), port


def request(job_id: str, prompt: list[int], max_tokens: int) -> pb.ExecuteRequest:
    # The model's end-of-generation tokens are banned, so that answers have the length that was asked for.
    return pb.ExecuteRequest(
        job_id=job_id,
        prompt_tokens=pb.TokenIds(ids=prompt),
        max_tokens=max_tokens,
        temperature=0.0,
        seed=1,
        logit_bias={0: -100.0, 2: -100.0},
    )


def read(stub: Any, message: pb.ExecuteRequest, count: Count) -> None:
    for event in stub.Execute(message, timeout=60):
        kind = event.WhichOneof("event")
        if kind == "started":
            count.prompt_tokens += event.started.prompt_tokens
            count.cached_tokens += event.started.cached_tokens
        elif kind == "token":
            count.tokens += len(event.token.ids)
        elif kind == "metrics":
            count.first_token_s.append(event.metrics.first_token_ms / 1000)
        elif kind == "end":
            count.answers += 1


def prompt(number: int, length: int) -> list[int]:
    return [3 + (number * 37 + i * 11) % 250 for i in range(length)]


def test_what_the_worker_counts_is_what_its_client_counts(worker: tuple[Any, int]) -> None:
    stub, port = worker
    before = scrape(port)
    count = Count()
    for number in range(12):
        read(stub, request(f"job-{number}", prompt(number, 40 + number), 5 + number), count)
    for number in range(3):  # the same again: found in the prefix cache
        read(stub, request(f"again-{number}", prompt(number, 40 + number), 5 + number), count)
    with pytest.raises(grpc.RpcError):
        read(stub, request("bad id", [5], 1), count)
    stub.Health(pb.HealthRequest())
    moved = changes(before, scrape(port))

    assert count.answers == 15
    assert moved['tokenwire_request_total{code="OK",method="Execute"}'] == 15
    assert moved['tokenwire_request_total{code="INVALID_REQUEST",method="Execute"}'] == 1
    assert moved['tokenwire_request_total{code="OK",method="Health"}'] == 1
    assert moved['tokenwire_request_duration_seconds_count{outcome="ok"}'] == 15
    assert moved["tokenwire_tokens_generated_total"] == count.tokens
    assert moved['tokenwire_prompt_tokens_total{source="cached"}'] == count.cached_tokens
    assert moved['tokenwire_prompt_tokens_total{source="computed"}'] == count.prompt_tokens - count.cached_tokens
    assert moved['tokenwire_cache_hit_total{tier="device"}'] == 3
    assert moved["tokenwire_cache_miss_total"] == 12
    assert moved["tokenwire_inter_token_latency_seconds_count"] == count.tokens - 15
    # Alone in its steps, a job takes one for each token: its prompt fits a step.
    assert moved["tokenwire_batch_size_count"] == moved["tokenwire_batch_size_sum"] == count.tokens
    assert moved['tokenwire_time_to_first_token_seconds_count{cache="cold"}'] == 12
    assert moved['tokenwire_time_to_first_token_seconds_count{cache="warm"}'] == 3
    sums = sum(moved[f'tokenwire_time_to_first_token_seconds_sum{{cache="{kind}"}}'] for kind in ("cold", "warm"))
    assert sums == pytest.approx(sum(count.first_token_s))


def test_gauges_are_true_when_scraped_and_every_cancel_is_counted(worker: tuple[Any, int]) -> None:
    stub, port = worker
    before = scrape(port)
    calls = [stub.Execute(request(f"long-{n}", prompt(100 + n, 20), 8000)) for n in range(8)]
    held = threading.Event()

    def hold(call: Any) -> None:
        try:
            for _ in call:
                held.wait(0.01)
        except grpc.RpcError:
            pass  # cancelled below

    readers = [threading.Thread(target=hold, args=(call,)) for call in calls]
    for reader in readers:
        reader.start()
    # Four run, as many as may; four wait.
    wait_until("all arrived", lambda: scrape(port)["tokenwire_request_queue_depth"] == 4)
    busy = scrape(port)
    health = stub.Health(pb.HealthRequest())
    assert busy["tokenwire_requests_active"] == 4
    assert busy['vllm:num_requests_running{model_name="tiny"}'] == 4
    assert busy['vllm:num_requests_waiting{model_name="tiny"}'] == 4
    assert busy["tokenwire_pool_utilization_ratio"] > 0
    assert busy['vllm:kv_cache_usage_perc{model_name="tiny"}'] == busy["tokenwire_pool_utilization_ratio"]
    assert (health.active, health.queued) == (4, 4)
    wait_until("they generate", lambda: scrape(port)["tokenwire_tokens_per_second"] > 0)
    for n in range(8):
        assert stub.Cancel(pb.CancelRequest(job_id=f"long-{n}")).outcome == pb.CancelResponse.OUTCOME_CANCELLED
    for reader in readers:
        reader.join(30)
    wait_until("all ended", lambda: scrape(port)["tokenwire_requests_active"] == 0)
    after = scrape(port)
    moved = changes(before, after)
    assert moved["tokenwire_cancel_latency_seconds_count"] == 8
    assert moved['tokenwire_request_total{code="CANCELLED",method="Execute"}'] == 8
    assert moved['tokenwire_request_total{code="OK",method="Cancel"}'] == 8
    assert moved['tokenwire_request_duration_seconds_count{outcome="cancelled"}'] == 8
    blocks = {state: after[f'tokenwire_kv_blocks{{state="{state}"}}'] for state in ("free", "used", "cached")}
    config = next(name for name in after if name.startswith("vllm:cache_config_info"))
    assert blocks["used"] == after["tokenwire_pool_utilization_ratio"] == 0
    assert f'num_gpu_blocks="{int(sum(blocks.values()))}"' in config
    assert 'block_size="16"' in config


def test_a_pool_that_is_too_small_is_seen_to_evict_and_to_preempt(worker: tuple[Any, int]) -> None:
    stub, port = worker
    before = scrape(port)
    threads = [
        threading.Thread(target=read, args=(stub, request(f"big-{n}", prompt(200 + n, 1500), 900), Count()))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    moved = changes(before, scrape(port))
    assert moved['tokenwire_request_total{code="OK",method="Execute"}'] == 4
    assert moved['tokenwire_eviction_total{tier="device"}'] > 0
    assert moved["tokenwire_preemption_total"] > 0


def test_every_declared_metric_is_exported_and_nearly_all_have_moved(worker: tuple[Any, int]) -> None:
    _, port = worker
    page = scrape(port)
    for item in declared.DECLARATIONS:
        if item.counted_by == "gateway":
            continue
        suffix = "_count" if item.kind == "histogram" else ""
        series = [value for name, value in page.items() if name.split("{")[0] == item.name + suffix]
        assert series, f"{item.name} is not exported"
        if item.counted_by != "state" and item.name not in STILL | {declared.LOG_LINES_DROPPED.name}:
            assert sum(series) > 0, f"{item.name} never moved"
    assert page["tokenwire_worker_uptime_seconds"] > 0
    assert page["tokenwire_worker_ready"] == page['tokenwire_worker_phase{phase="ready"}'] == 1
    assert page['tokenwire_memory_used_bytes{kind="weights"}'] > 0
    assert page["tokenwire_worker_vram_bytes"] == 0
    assert page["vllm:lora_requests_info" + '{max_lora="0",running_lora_adapters="",waiting_lora_adapters=""}'] == (
        pytest.approx(time.time(), abs=60)
    )


def test_hostile_requests_add_no_series(worker: tuple[Any, int]) -> None:
    stub, port = worker
    stub.Health(pb.HealthRequest())
    series = set(scrape(port))
    for number in range(300):
        hostile = f'x{number}"}}\n# HELP evil {{a="b"}} \x00\u2028\\'
        with pytest.raises(grpc.RpcError):
            list(stub.Execute(pb.ExecuteRequest(job_id=hostile, prompt="x"), timeout=30))
    assert set(scrape(port)) == series


def test_the_page_is_valid_in_both_formats(worker: tuple[Any, int]) -> None:
    import urllib.request

    from prometheus_client.openmetrics.parser import text_string_to_metric_families

    _, port = worker
    url = f"http://127.0.0.1:{port}/metrics"
    plain = urllib.request.urlopen(url, timeout=20)
    assert plain.headers["Content-Type"].startswith("text/plain")
    assert parse(plain.read().decode())
    wanted = urllib.request.Request(url, headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    page = urllib.request.urlopen(wanted, timeout=20)  # noqa: S310 - our own address
    assert page.headers["Content-Type"].startswith("application/openmetrics-text")
    assert list(text_string_to_metric_families(page.read().decode()))
