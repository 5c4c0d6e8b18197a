"""The declarations of metrics: complete, documented, and safe to serve."""

from __future__ import annotations

import http.client
import re
import socket
from pathlib import Path

import pytest

from tokenwire.errors import ERRORS
from tokenwire.observe import metrics
from tokenwire.observe.collect import Snapshot, WorkerMetrics
from tokenwire.observe.exposition import MAX_CONNECTIONS, MetricsServer, render

DOCS = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"

# A-4, with the names that routers read.
REQUIRED = """
request_total request_duration_seconds time_to_first_token_seconds request_queue_depth batch_size
tokens_generated_total tokens_per_second memory_used_bytes cache_hit_total cache_miss_total pool_utilization_ratio
eviction_total agents_active model_swap_duration_seconds cache_persist_duration_seconds inter_token_latency_seconds
cancel_latency_seconds worker_vram_bytes worker_uptime_seconds
"""
ALIASES = {"num_requests_waiting", "num_requests_running", "kv_cache_usage_perc", "cache_config_info"}


def loading_worker() -> Snapshot:
    return Snapshot("loading", False, 25, 3.0, "some-model", "cpu", "", None)


def page_of(worker: WorkerMetrics) -> str:
    return render(worker.registry)[0].decode()


def test_what_the_contract_asks_for_is_declared() -> None:
    names = {item.name for item in metrics.DECLARATIONS}
    assert {metrics.PREFIX + name for name in REQUIRED.split()} | {f"vllm:{name}" for name in ALIASES} <= names
    assert len(names) == len(metrics.DECLARATIONS)
    for item in metrics.DECLARATIONS:
        assert re.fullmatch(r"[a-z:_]+", item.name)
        assert item.name.endswith("_total") == (item.kind == "counter"), item.name
        assert item.help.endswith(".")
        assert list(item.buckets) == sorted(item.buckets)


def test_the_documentation_is_what_the_declarations_say() -> None:
    assert DOCS.read_text(encoding="utf-8") == metrics.markdown(), (
        "python -m tokenwire.observe.metrics > docs/metrics.md"
    )


def test_a_loading_worker_can_be_scraped() -> None:
    page = page_of(WorkerMetrics(loading_worker))
    assert 'tokenwire_worker_phase{phase="loading"} 1.0' in page
    assert "tokenwire_worker_load_ratio 0.25" in page
    assert "tokenwire_request_queue_depth" not in page, "nothing is known of an engine that is not there"


def test_every_code_has_its_series_from_the_start() -> None:
    page = page_of(WorkerMetrics(loading_worker))
    for code in (metrics.OK, *ERRORS, metrics.DISCONNECTED):
        assert f'tokenwire_request_total{{code="{code}",method="Execute"}} 0.0' in page


@pytest.mark.parametrize("text", ["Other", "x" * 5000, 'a"} 1\n', "\u2028"])
def test_an_unknown_method_or_code_adds_no_series(text: str) -> None:
    worker = WorkerMetrics(loading_worker)
    worker.call_ended("unknown", "unknown")
    before = page_of(worker).count("\n")
    worker.call_ended(text, text)
    page = page_of(worker)
    assert page.count("\n") == before
    assert 'tokenwire_request_total{code="INTERNAL",method="other"} 2.0' in page


def test_the_server_answers_at_any_path_and_stops() -> None:
    server = MetricsServer(WorkerMetrics(loading_worker).registry, "127.0.0.1", 0)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("GET", "/metrics")
    answer = connection.getresponse()
    assert (answer.status, b"tokenwire_worker_info" in answer.read()) == (200, True)
    connection.close()
    server.close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", server.port), timeout=5)


def test_connections_that_say_nothing_do_not_pile_up() -> None:
    server = MetricsServer(WorkerMetrics(loading_worker).registry, "127.0.0.1", 0)
    silent = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(MAX_CONNECTIONS + 5)]
    # Those beyond the limit are closed, the others held.
    assert sum(_is_closed(connection) for connection in silent[MAX_CONNECTIONS:]) == 5
    for connection in silent:
        connection.close()
    server.close()


def test_a_port_in_use_is_an_error() -> None:
    server = MetricsServer(WorkerMetrics(loading_worker).registry, "127.0.0.1", 0)
    with pytest.raises(OSError, match="in use"):
        MetricsServer(WorkerMetrics(loading_worker).registry, "127.0.0.1", server.port)
    server.close()


def _is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True
