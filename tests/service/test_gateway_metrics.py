"""The metrics page over HTTP: the worker's own inside its process, the gateway's where it runs apart (W-50)."""

from __future__ import annotations

from typing import Any

import httpx

from e2e.helpers_metrics import parse
from tokenwire.rpc.state import Phase


async def test_a_gateway_apart_counts_the_workers_behind_it(worker: Any, start_gateway: Any) -> None:
    gateway = await start_gateway(worker.target, "127.0.0.1:1", ready=False)

    async def counts() -> list[float]:
        page = await gateway.http.get("/metrics")
        assert page.status_code == 200
        samples = parse(page.text)
        return [
            samples[f'tokenwire_gateway_workers{{state="{state}"}}'] for state in ("ready", "not_ready", "unreachable")
        ]

    while await counts() != [1, 0, 1]:
        pass  # until the gateway has heard of both; the test's time is bounded
    worker.state.enter(Phase.DRAINING)
    while await counts() != [0, 1, 1]:
        pass


async def test_ignored_fields_are_counted(gateway: Any, worker: Any) -> None:
    """H21."""
    worker.fake.eager = True
    body = {"job_id": "j", "prompt": "x", "colour": "green", "shape": None}
    assert (await gateway.http.post("/execute", json=body)).status_code == 200
    page = parse((await gateway.http.get("/metrics")).text)
    assert page["tokenwire_gateway_unknown_fields_total"] == 2


async def test_the_page_comes_in_the_format_that_was_asked_for(gateway: Any) -> None:
    plain = await gateway.http.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain")
    modern = await gateway.http.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert modern.headers["content-type"].startswith("application/openmetrics-text")
    assert modern.text.endswith("# EOF\n")


async def test_inside_the_worker_it_is_the_page_of_the_metrics_port(start: Any) -> None:
    process = await start("eager", http_port=0, metrics_port=0)
    await process.connect()
    ready = next(line for line in process.lines if line["event"] == "ready")
    async with httpx.AsyncClient(trust_env=False, timeout=20) as http:
        names = []
        for port in (ready["http_port"], ready["metrics_port"]):
            page = parse((await http.get(f"http://127.0.0.1:{port}/metrics")).text)
            names.append({name for name in page if name.startswith(("tokenwire_", "vllm:"))})
    assert names[0] == names[1]
    assert 'tokenwire_worker_phase{phase="ready"}' in names[0]
