"""A worker process with keys and TLS: SIGHUP, refusals in the log, and no key in any line."""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from certificates import Authority
from service.helpers_security import save
from tokenwire.client import AsyncClient, TokenwireRpcError, channel_credentials
from tokenwire.observe.refusals import MAX_LINES_PER_SECOND
from tokenwire.security.keys import NewKey, create_key


async def code_of(client: AsyncClient) -> str:
    try:
        await client.generate("Hello")
    except TokenwireRpcError as error:
        return error.code
    return "OK"


def connect(port: int, ca: Path, key: NewKey | None = None, **options: Any) -> AsyncClient:
    return AsyncClient(
        f"localhost:{port}",
        credentials=channel_credentials(ca),
        api_key=key.text if key else None,
        timeout_s=20,
        options=(("grpc.use_local_subchannel_pool", 1),),
        **options,
    )


async def test_p3_sighup_reads_keys_and_certificates_anew(start: Any, tmp_path: Path) -> None:
    """P3: new files take effect, a bad one changes nothing, and a stream that runs is not dropped."""
    ca, keys = Authority(tmp_path), tmp_path / "keys.json"
    pair = ca.issue("server")
    kept, dropped, late = create_key("kept"), create_key("dropped"), create_key("late")
    save(keys, kept, dropped)
    files = {"tls_cert_file": str(pair.cert), "tls_key_file": str(pair.key)}
    worker = await start("held", api_keys_file=str(keys), **files)
    listening = await worker.log_line("ready")
    port = listening["port"]
    runs, ends = connect(port, ca.cert, kept), connect(port, ca.cert, dropped)
    running, ending = runs.execute("Hello", job_id="a"), ends.execute("Hello", job_id="b")
    for stream in (running, ending):
        assert type(await stream.__anext__()).__name__ == "Started"
        assert type(await stream.__anext__()).__name__ == "Token"

    save(keys, kept, late)
    new = ca.issue("new")
    shutil.copy(new.cert, pair.cert)
    shutil.copy(new.key, pair.key)
    worker.process.send_signal(signal.SIGHUP)
    assert (await worker.log_line("keys_reloaded"))["calls_ended"] == 1
    assert (await worker.log_line("certificates_reloaded"))["changed"] is True
    with pytest.raises(TokenwireRpcError, match="UNAUTHENTICATED: the credential was revoked"):
        [event async for event in ending]
    assert await code_of(ends) == "UNAUTHENTICATED"
    newcomer = connect(port, ca.cert, late)
    started = newcomer.execute("Hello")
    assert type(await started.__anext__()).__name__ == "Started"
    started.close()

    keys.write_text("{")
    pair.key.write_text("")
    worker.process.send_signal(signal.SIGHUP)
    failed = [await worker.log_line("reload_failed") for _ in range(2)]
    assert [line["what"] for line in failed] == ["keys", "certificates"]
    again = newcomer.execute("Hello")
    assert type(await again.__anext__()).__name__ == "Started"
    again.close()

    assert (await runs.cancel("a")).outcome == "cancelled"
    with pytest.raises(TokenwireRpcError, match="CANCELLED"):
        [event async for event in running]
    for client in (runs, ends, newcomer):
        await client.close()
    worker.process.send_signal(signal.SIGTERM)
    assert await worker.exit_status() == 0


async def test_no_line_of_the_log_holds_a_key_or_its_hash(start: Any, tmp_path: Path) -> None:
    """At debug level, with right, wrong, misplaced and repeated keys, and handshakes that fail."""
    ca, keys = Authority(tmp_path), tmp_path / "keys.json"
    pair = ca.issue("server")
    right, wrong = create_key("right"), create_key("wrong")
    save(keys, right)
    files = {"tls_cert_file": str(pair.cert), "tls_key_file": str(pair.key)}
    worker = await start("eager", api_keys_file=str(keys), log_level="debug", **files)
    port = (await worker.log_line("ready"))["port"]
    bearer = f"Bearer {right.text}"
    clients = [
        connect(port, ca.cert, right),
        connect(port, ca.cert, wrong),
        connect(port, ca.cert),
        connect(port, ca.cert, metadata=(("authorization", bearer), ("authorization", bearer))),
        connect(port, ca.cert, right, metadata=(("x-api-key", wrong.text),)),
        connect(port, ca.cert, metadata=(("authorization", f"Basic {right.text}"),)),
        # A key where an id belongs is well-formed, and so it is logged.
        connect(port, ca.cert, right, metadata=(("x-correlation-id", right.text), ("x-request-id", wrong.text))),
    ]
    codes = [await code_of(client) for client in clients]
    assert codes == ["OK", *["UNAUTHENTICATED"] * 5, "OK"]
    with pytest.raises(TokenwireRpcError):
        await clients[0].generate("Hello", job_id=f"{right.text}", temperature=9.0)
    async with AsyncClient(f"127.0.0.1:{port}", timeout_s=5) as plain:
        assert await code_of(plain) == "UNAVAILABLE"
    worker.process.send_signal(signal.SIGHUP)
    await worker.log_line("keys_reloaded")
    for client in clients:
        await client.close()
    worker.process.send_signal(signal.SIGTERM)
    assert await worker.exit_status() == 0
    text = json.dumps(worker.lines)
    assert f"key:{right.record.id}" in text
    assert f"twk_{right.record.id}_[secret]" in text
    for key in (right, wrong):
        assert key.text.split("_", 2)[2] not in text
        assert key.record.sha256 not in text


async def test_a_flood_of_refusals_writes_few_lines(start: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    save(keys)
    worker = await start("eager", api_keys_file=str(keys))
    await worker.connect()
    calls = 40 * MAX_LINES_PER_SECOND
    began = time.monotonic()
    for _ in range(calls):
        with pytest.raises(grpc.aio.AioRpcError):
            await worker.stub.Cancel(_cancel(), metadata=(("x-api-key", "x"),))
    worker.process.send_signal(signal.SIGTERM)
    seconds = math.ceil(time.monotonic() - began) + 1  # as many as the calls can lie in
    assert await worker.exit_status() == 0
    refused = [line for line in worker.lines if line["event"] == "refused"]
    counts = [line["left_out"] for line in refused if "left_out" in line]
    written = len(refused) - len(counts)
    assert MAX_LINES_PER_SECOND <= written <= seconds * MAX_LINES_PER_SECOND
    assert written + sum(counts) == calls
    assert {line["code"] for line in refused} == {"UNAUTHENTICATED"}


def _cancel() -> Any:
    from tokenwire.v1 import inference_pb2 as pb

    return pb.CancelRequest(job_id="x")


async def test_every_command_talks_to_a_worker_with_tls_and_keys(start: Any, tmp_path: Path) -> None:
    """As docs/security.md has it: a key from the environment, the worker's root from a file."""
    ca, keys = Authority(tmp_path), tmp_path / "keys.json"
    pair, key = ca.issue("server"), create_key("k")
    save(keys, key)
    worker = await start(
        "eager", api_keys_file=str(keys), tls_cert_file=str(pair.cert), tls_key_file=str(pair.key),
        tls_client_ca_file=str(ca.cert),
    )  # fmt: skip
    client = ca.issue("client")
    target = f"localhost:{(await worker.log_line('ready'))['port']}"
    options = ("--target", target, "--ca", str(ca.cert), "--cert", str(client.cert), "--key", str(client.key))

    async def run(*arguments: str, api_key: str | None = key.text) -> tuple[int, str, str]:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("TOKENWIRE_")}
        if api_key is not None:
            environ["TOKENWIRE_API_KEY"] = api_key
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tokenwire", *arguments, *options, env=environ,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await asyncio.wait_for(process.communicate(b"Hi\n"), 60)
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()

    results = await asyncio.gather(
        run("generate", "Hello"),
        run("chat"),
        run("health"),
        run(
            "bench",
            "--requests",
            "4",
            "--concurrency",
            "2",
            "--processes",
            "2",
            "--prompt-tokens",
            "4",
            "--max-tokens",
            "3",
        ),
        run("generate", "Hello", api_key=create_key("wrong").text),
    )
    assert [code for code, _, _ in results] == [0, 0, 0, 0, 1], results
    assert "Hello world!" in results[0][1]
    assert "4 answers" in results[3][1]
    assert "UNAUTHENTICATED" in results[4][2]
    assert key.text not in str(results)


async def test_a_remote_worker_without_tls_says_so(start: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    save(keys, create_key("k"))
    worker = await start("eager", api_keys_file=str(keys), allow_remote=True)
    assert "unencrypted" in (await worker.log_line("plain_text"))["message"]
    await worker.log_line("ready")
    worker.process.send_signal(signal.SIGTERM)
    assert await worker.exit_status() == 0
