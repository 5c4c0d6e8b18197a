"""The HTTP port with TLS and client certificates, inside a worker's process and apart from it."""

from __future__ import annotations

import json
import signal
import ssl
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509

from certificates import Authority, Pair
from service.helpers_gateway import body
from service.helpers_security import bearer, save
from service.worker_process import spawn
from tokenwire.security.guard import VOUCHED_KEY, Guard
from tokenwire.security.keys import create_key
from tokenwire.security.tls import CertificateSource, TlsFiles
from tokenwire.v1 import inference_pb2 as pb


def tls_client(ca: Authority, pair: Pair | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(ca.cert))
    if pair is not None:
        context.load_cert_chain(pair.cert, pair.key)
    return context


async def test_http_speaks_tls_and_takes_new_certificates(start_both: Any, tmp_path: Path) -> None:
    ca = Authority(tmp_path)
    pair = ca.issue("server")
    source = CertificateSource(TlsFiles(pair.cert, pair.key))
    worker, gateway = await start_both(Guard(), source, verify=tls_client(ca))
    worker.fake.eager = True
    assert "event: end" in (await gateway.http.post("/execute", json=body())).text
    with pytest.raises(httpx.HTTPError):
        async with httpx.AsyncClient(trust_env=False) as plain:
            await plain.get(f"http://127.0.0.1:{gateway.server.port}/health/live")
    folder = tmp_path / "other"
    folder.mkdir()
    other = Authority(folder, "other")
    new = other.issue("new")
    pair.cert.write_bytes(new.cert.read_bytes())
    pair.key.write_bytes(new.key.read_bytes())
    assert source.reload()
    assert (await gateway.http.get("/health/live")).status_code == 200  # the open connection goes on
    async with httpx.AsyncClient(base_url=gateway.http.base_url, trust_env=False, verify=tls_client(ca)) as late:
        with pytest.raises(httpx.ConnectError):
            await late.get("/health/live")
    async with httpx.AsyncClient(base_url=gateway.http.base_url, trust_env=False, verify=tls_client(other)) as late:
        assert (await late.get("/health/live")).status_code == 200


async def test_a_client_certificate_is_the_same_principal_on_both_ports(start_both: Any, tmp_path: Path) -> None:
    ca = Authority(tmp_path)
    pair = ca.issue("server")
    source = CertificateSource(TlsFiles(pair.cert, pair.key, ca.cert))
    guard = Guard(client_certificates=True)
    alice = ca.issue("alice", (x509.DNSName("alice.example.org"),))
    bob = ca.issue("bob", (x509.UniformResourceIdentifier("spiffe://example.org/bob"),))
    worker, gateway = await start_both(guard, source, verify=tls_client(ca, alice))
    worker.fake.eager = True
    forged = {VOUCHED_KEY: guard.vouch("dns:mallory.example.org")}
    for headers in ({}, forged):  # what a client sends of that name goes nowhere
        assert "event: end" in (await gateway.http.post("/execute", json=body(), headers=headers)).text
    async with httpx.AsyncClient(base_url=gateway.http.base_url, trust_env=False, verify=tls_client(ca, bob)) as other:
        assert "event: end" in (await other.post("/execute", json=body())).text
    with pytest.raises(httpx.HTTPError):
        async with httpx.AsyncClient(trust_env=False, verify=tls_client(ca)) as nobody:
            await nobody.get(f"{gateway.http.base_url}/health/live")
    salts = [job.spec["cache_salt"] for job in worker.fake.jobs]
    assert salts[0] == salts[1] != salts[2]
    by_grpc = (VOUCHED_KEY, guard.vouch("dns:alice.example.org"))
    call = worker.stub.Execute(pb.ExecuteRequest(job_id="x", prompt="x"), metadata=(by_grpc,))
    assert [event.WhichOneof("event") async for event in call][-1] == "end"
    assert worker.fake.jobs[-1].spec["cache_salt"] == salts[0]


async def test_both_ports_of_a_process_share_keys_certificates_and_sighup(start: Any, tmp_path: Path) -> None:
    """`serve --http-port` with TLS and keys; the gateway inside reaches its worker past TLS."""
    ca = Authority(tmp_path)
    pair = ca.issue("server", (x509.DNSName("localhost"),))
    first, second = create_key("first"), create_key("second")
    keys = save(tmp_path / "keys.json", first)
    files = {"tls_cert_file": str(pair.cert), "tls_key_file": str(pair.key), "api_keys_file": str(keys)}
    worker = await start("eager", http_port=0, log_level="debug", **files)
    port = (await worker.log_line("ready"))["http_port"]
    url = f"https://localhost:{port}/execute"
    async with httpx.AsyncClient(trust_env=False, verify=tls_client(ca), timeout=20) as http:
        assert "event: end" in (await http.post(url, json=body(), headers=bearer(first))).text
        assert (await http.post(url, json=body(), headers=bearer(second))).status_code == 401
        save(keys, second)
        worker.process.send_signal(signal.SIGHUP)
        await worker.log_line("certificates_reloaded")
        assert (await http.post(url, json=body(), headers=bearer(first))).status_code == 401
        assert "event: end" in (await http.post(url, json=body(), headers=bearer(second))).text
        assert (await http.get(f"{url}?key={second.text}")).status_code in (401, 405)
    worker.process.send_signal(signal.SIGTERM)
    assert await worker.exit_status() == 0
    text = json.dumps(worker.lines)
    for key in (first, second):
        assert key.text.split("_", 2)[2] not in text


async def test_a_gateway_apart_speaks_tls_on_both_sides_and_reloads(start: Any, tmp_path: Path) -> None:
    """`tokenwire gateway`: client certificates towards the workers, keys and TLS towards its own clients, SIGHUP."""
    ca = Authority(tmp_path)
    pair, own = ca.issue("server"), ca.issue("gateway", (x509.DNSName("gateway.example.org"),))
    first, second = create_key("first"), create_key("second")
    worker_keys, gateway_keys = save(tmp_path / "w.json", first, second), save(tmp_path / "g.json", first)
    tls = {"tls_cert_file": str(pair.cert), "tls_key_file": str(pair.key)}
    worker = await start("eager", api_keys_file=str(worker_keys), tls_client_ca_file=str(ca.cert), **tls)
    target = f"localhost:{(await worker.log_line('ready'))['port']}"
    flags = {
        "target": target, "target_ca_file": str(ca.cert), "target_cert_file": str(own.cert),
        "target_key_file": str(own.key), "api_keys_file": str(gateway_keys), "http_port": "0", "log_format": "json",
        **tls,
    }  # fmt: skip
    arguments = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", value)]
    gateway = await spawn(sys.executable, "-m", "tokenwire", "gateway", *arguments)
    try:
        url = f"https://localhost:{(await gateway.log_line('listening'))['http_port']}/execute"
        await gateway.log_line("worker_ready")
        async with httpx.AsyncClient(trust_env=False, verify=tls_client(ca), timeout=20) as http:
            assert "event: end" in (await http.post(url, json=body(), headers=bearer(first))).text
            assert (await http.post(url, json=body(), headers=bearer(second))).status_code == 401
            save(gateway_keys, second)
            gateway.process.send_signal(signal.SIGHUP)
            await gateway.log_line("keys_reloaded")
            assert (await http.post(url, json=body(), headers=bearer(first))).status_code == 401
            assert "event: end" in (await http.post(url, json=body(), headers=bearer(second))).text
        gateway.process.send_signal(signal.SIGTERM)
        assert await gateway.exit_status() == 0
    finally:
        await gateway.close()
