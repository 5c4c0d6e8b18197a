"""The examples over HTTP do what they say, against a real worker with its gateway."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from breaking_proxy import breaking_proxy


def test_curl_goes_through_streams_resuming_and_errors(run: Any) -> None:
    done = run("shell/curl.sh")
    assert done.returncode == 0, done.stderr
    _, health, stream, _, attached, cancelled, openai, refused = done.stdout.split("--- ")
    assert json.loads(health.splitlines()[1])["status"] == "healthy"
    kinds = re.findall(r"^event: (\w+)$", stream, re.M)
    assert (kinds[0], kinds[-2:]) == ("started", ["metrics", "end"])
    tokens, resumed = (
        [json.loads(data) for data in re.findall(r"^event: token\nid: \d+\ndata: (.+)$", part, re.M)]
        for part in (stream, attached)
    )
    # On a busy machine an event may carry several tokens.
    assert tokens[0]["i"] == 0
    assert "".join(token["t"] for token in tokens).startswith(" Paris")
    assert resumed[0]["i"] == 290
    assert '"tokens_out":300' in attached
    assert json.loads(cancelled.splitlines()[1])["outcome"] == "already_finished"
    chunks = [json.loads(data) for data in re.findall(r"^data: (\{.+)$", openai, re.M)]
    assert "Paris" in "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert "data: [DONE]" in openai
    error = json.loads(refused.splitlines()[1].removesuffix("refused, as it should be"))["error"]
    assert {field["field"] for field in error["details"]["fields"]} == {"job_id", "temperature"}
    assert "refused, as it should be" in refused


def test_the_openai_package_works_unchanged(run: Any) -> None:
    done = run(sys.executable, "python/openai_sdk.py", PYTHONWARNINGS="default")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert re.search(r"^\[\d+ \+ \d+ tokens\]$", done.stdout, re.M)
    assert len(re.findall(r"^'.+': -\d+\.\d\d$", done.stdout, re.M)) == 3
    assert done.stdout.splitlines()[-1].startswith("refused: ")


@pytest.mark.node
async def test_fetch_streams_and_resumes(run: Any, http_port: int, javascript: Path) -> None:
    unbroken = await asyncio.to_thread(run, "node", "http.mjs", "Once upon a time", cwd=javascript)
    assert unbroken.returncode == 0, unbroken.stderr
    assert unbroken.stdout.endswith("[40 tokens, MAX_TOKENS]\n")
    text = unbroken.stdout.split("\n[")[0]
    # Within what every connection carries, even one that finds the job done and gets the rest of it as one event.
    async with breaking_proxy(http_port, cuts=[1000, 900]) as proxy:
        url = f"http://{proxy.target}"
        broken = await asyncio.to_thread(run, "node", "http.mjs", "Once upon a time", cwd=javascript, TOKENWIRE_URL=url)
        assert proxy.num_cut == 2
    assert broken.returncode == 0, broken.stderr
    assert broken.stdout.split("\n[")[0] == text


@pytest.mark.node
def test_fetch_names_an_error(run: Any, javascript: Path) -> None:
    done = run("node", "http.mjs", "", cwd=javascript)
    assert done.returncode == 1
    assert done.stderr.startswith("INVALID_REQUEST: ")
