"""The OpenAPI document is served, valid, complete, and true: schemathesis sends what it allows and what it forbids."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from e2e.helpers import only_when_asked, say
from tokenwire.gateway.app import _router
from tokenwire.gateway.errors import HTTP_ERRORS
from tokenwire.security.policy import ROUTES

# What the document promises is held to these. What it cannot say (a context's length, an unknown model) may be refused.
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


async def test_every_path_is_in_the_document_and_has_a_rule(gateway: Any) -> None:
    response = await gateway.http.get("/openapi.json")
    assert response.status_code == 200
    document = response.json()
    described = {(path, method.upper()) for path, item in document["paths"].items() for method in item}
    routes = {
        (route.path.replace("{model:path}", "{model}"), method)  # type: ignore[attr-defined]
        for route in _router(gateway.server.gateway).routes
        for method in route.methods  # type: ignore[attr-defined]
        if method != "HEAD"
    }
    page = {(path, "GET") for path in ("/", "/page.css", "/page.js", "/icon.svg", "/openapi.json")}
    assert described == routes - page - {("/shutdown", "POST")}
    assert {path.replace("{job_id}", "*").replace("{model}", "*") for path, _ in routes} <= {
        *ROUTES,
        "/health/live",
    } | {
        "/health/ready",
        "/health/startup",
    }


def test_the_documentation_has_what_only_http_refuses() -> None:
    text = Path(__file__).parents[2].joinpath("docs", "http.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([A-Z_]+)` \| (\d+) \|", text, re.M)
    assert dict(rows) == {row.code: str(row.status) for row in HTTP_ERRORS.values()}


async def run_schemathesis(gateway: Any, seconds: int, directory: Path) -> None:
    """Runs in `directory`, where it leaves its notes. Fails on the first thing that the document does not allow."""
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        *("run", f"http://127.0.0.1:{gateway.port}/openapi.json"),
        *("--checks", CHECKS, "--max-time", str(seconds), "--seed", os.environ.get("FUZZ_SEED", "1")),
        *("--no-color", "--warnings", "off", "--request-timeout", "60", "--max-failures", "5"),
    ]
    environment = {**os.environ, "NO_PROXY": "*"}
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=environment, cwd=directory
    )
    output, _ = await asyncio.wait_for(process.communicate(), seconds + 90)
    text = output.decode("utf-8", "replace")
    say("\n".join(text.splitlines()[-12:]))
    assert process.returncode == 0, text[-8000:]


async def test_the_document_is_true(worker: Any, gateway: Any, tmp_path: Path) -> None:
    worker.fake.eager = True
    await run_schemathesis(gateway, 12, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_the_document_is_true_for_ten_minutes(
    worker: Any, gateway: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    only_when_asked(request)
    worker.fake.eager = True
    await run_schemathesis(gateway, 600, tmp_path)
