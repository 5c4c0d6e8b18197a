"""The HTTP port's keys, certificates and limits: the same decision as at the gRPC port, and one count for both."""

from __future__ import annotations

import asyncio
import json
import signal
import ssl
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from prometheus_client import CollectorRegistry
from starlette.routing import Route

from certificates import Authority, Pair
from service.worker_process import spawn
from tokenwire.config import ConfigError, load_gateway_settings, load_settings
from tokenwire.gateway.app import _router
from tokenwire.gateway.context import Gateway
from tokenwire.gateway.pool import WorkerPool
from tokenwire.security.guard import VOUCHED_KEY, Guard
from tokenwire.security.key_file import write_keys
from tokenwire.security.keys import KeyRing, NewKey, create_key
from tokenwire.security.policy import ADMIN, PUBLIC, route_rule
from tokenwire.security.principal import Quota, Scope
from tokenwire.security.setup import Security, file_problems
from tokenwire.security.tls import CertificateSource, TlsFiles
from tokenwire.v1 import inference_pb2 as pb

USER = (Scope.EXECUTE, Scope.CANCEL)


class FakeClock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def save(path: Path, *keys: NewKey) -> Path:
    write_keys(path, KeyRing(key.record for key in keys))
    return path


def bearer(key: NewKey) -> dict[str, str]:
    return {"authorization": f"Bearer {key.text}"}


@pytest.fixture
def start_both(start_worker: Any, start_gateway: Any) -> Callable[..., Any]:
    """A worker and an HTTP port of one guard, as `serve --http-port` has them."""

    async def start(guard: Guard, certificates: CertificateSource | None = None, **options: Any) -> tuple[Any, Any]:
        worker = await start_worker(guard=guard)
        return worker, await start_gateway(worker.target, security=Security(guard, certificates), **options)

    return start


def body(job_id: str = "job-1", **fields: Any) -> dict[str, Any]:
    return {"job_id": job_id, "prompt": "Hello", **fields}


WRONG = create_key("wrong").text


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("authorization", "")],
        [("authorization", "junk")],
        [("authorization", "Bearer")],
        [("authorization", f"Bearer {WRONG}")],
        [("authorization", f"bearer {WRONG.lower()}")],
        [("authorization", f"Basic {WRONG}")],
        [("authorization", f"Bearer {WRONG}, Bearer {WRONG}")],
        [("authorization", f"Bearer {WRONG}"), ("authorization", f"Bearer {WRONG}")],
        [("authorization", f"Bearer {WRONG}"), ("x-api-key", WRONG)],
        [("x-api-key", WRONG)],
        [("x-api-key", "\xff\xfe")],
        [(VOUCHED_KEY, "x cn:alice")],
    ],
)
@pytest.mark.parametrize("path", ["/execute", "/v1/chat/completions"])
async def test_h23_r14_a_wrong_credential_is_401_before_the_body_is_read(
    start_both: Any, tmp_path: Path, headers: list[tuple[str, str]], path: str
) -> None:
    """H23, R13, R14; the body is neither read nor checked."""
    worker, gateway = await start_both(Guard(save(tmp_path / "keys.json", create_key("k"))))
    sent = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    response = await gateway.http.post(path, content=b"{not json", headers=sent)
    assert response.status_code == 401
    assert response.headers["www-authenticate"].startswith("Bearer")
    assert response.headers["x-correlation-id"]
    error = response.json()["error"]
    code = error["code"].upper()
    assert code == "UNAUTHENTICATED"
    if len(headers) > 1:
        assert error["details"]["cause"] == "AMBIGUOUS_CREDENTIALS"
    else:
        assert error["message"] == "a valid credential is required"
    assert WRONG not in response.text
    assert worker.fake.jobs == []


async def test_a_key_works_on_every_path_that_it_may_use(start_both: Any, tmp_path: Path) -> None:
    user = create_key("user", USER)
    worker, gateway = await start_both(Guard(save(tmp_path / "keys.json", user)))
    worker.fake.eager = True
    for headers in (bearer(user), {"x-api-key": user.text}, {"authorization": f"bearer {user.text}"}):
        response = await gateway.http.post("/execute", json=body(), headers=headers)
        assert "event: end" in response.text
    chat = {"model": "test-model", "messages": [{"role": "user", "content": "Hi"}]}
    assert (await gateway.http.post("/v1/chat/completions", json=chat, headers=bearer(user))).status_code == 200
    assert (await gateway.http.get("/v1/models", headers=bearer(user))).status_code == 200
    assert (await gateway.http.post("/cancel", json={"job_id": "x"}, headers=bearer(user))).status_code == 202
    assert len({job.spec["cache_salt"] for job in worker.fake.jobs}) == 1


async def test_probes_are_free_and_nothing_else_is(start_both: Any, tmp_path: Path) -> None:
    guard = Guard(save(tmp_path / "keys.json"), overall=Quota(requests_per_minute=1))
    _, gateway = await start_both(guard)
    for path in ("/health", "/health/live", "/health/ready", "/health/startup"):
        for _ in range(3):
            assert (await gateway.http.get(path)).status_code == 200
    for path in ("/v1/models", "/execute/x", "/metrics", "/shutdown", "/no/such/path", "/healthz", "/v1/health"):
        assert (await gateway.http.get(path)).status_code == 401, path


async def test_every_route_is_in_the_policy(start_both: Any, start_gateway: Any) -> None:
    """Deny by default: a path that somebody adds is refused until the table knows it."""
    pool = WorkerPool(())
    router = _router(Gateway(load_settings(environ={}), pool, CollectorRegistry()))
    paths = [route.path for route in router.routes if isinstance(route, Route)]
    assert len(paths) >= 10
    assert [
        path for path in paths if route_rule(path.replace("{job_id}", "x").replace("{model:path}", "x")) is None
    ] == []


@pytest.mark.parametrize(
    "path",
    [
        "/admin",
        "/healthz",
        "/health/../cancel",
        "/execute/../cancel",
        "/cancel/",
        "//execute",
        "/EXECUTE",
        "",
        "/v1",
        "*",
    ],
)
def test_h20_no_path_is_another_in_disguise(path: str) -> None:
    """H20: rules go by the path as it stands; what a wildcard takes in reaches no other route."""
    rule = route_rule(path)
    assert rule is None or rule is route_rule(path.partition("/../")[0] + "/x")


async def test_h20_a_disguised_path_reaches_nothing(start_both: Any, tmp_path: Path) -> None:
    """H20, over the wire and with a valid key."""
    user = create_key("user", USER)
    _, gateway = await start_both(Guard(save(tmp_path / "keys.json", user)))
    for path in ("/health/../cancel", "/health/%2e%2e/cancel", "//cancel", "/cancel;x", "/admin", "/v1/../admin"):
        host, port = gateway.http.base_url.host, gateway.http.base_url.port
        reader, writer = await asyncio.open_connection(host, port)
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nx-api-key: {user.text}\r\ncontent-length: 0\r\n\r\n"
        writer.write(head.encode())
        assert (await reader.readline()).split()[1] == b"404", path
        writer.close()


def test_administration_needs_its_scope_and_public_is_what_it_should_be() -> None:
    assert route_rule("/shutdown") is ADMIN
    assert route_rule("/health/ready") is PUBLIC
    assert route_rule("/metrics") is not PUBLIC


async def test_a_key_without_the_scope_is_403(start_both: Any, tmp_path: Path) -> None:
    reader = create_key("reader", [Scope.CANCEL])
    _, gateway = await start_both(Guard(save(tmp_path / "keys.json", reader)))
    response = await gateway.http.post("/execute", json=body(), headers=bearer(reader))
    assert (response.status_code, response.json()["error"]["code"]) == (403, "PERMISSION_DENIED")
    response = await gateway.http.post("/v1/completions", json={}, headers=bearer(reader))
    assert (response.status_code, response.json()["error"]["type"]) == (403, "permission_error")


async def test_a_rate_is_one_for_both_ports_and_a_refusal_says_when(start_both: Any, tmp_path: Path) -> None:
    """W-30: 429 + Retry-After; a request counts once, whichever port it came through."""
    clock, user = FakeClock(), create_key("user", USER)
    guard = Guard(save(tmp_path / "keys.json", user), each=Quota(requests_per_minute=3), clock=clock)
    worker, gateway = await start_both(guard)
    worker.fake.eager = True
    for number in range(2):
        response = await gateway.http.post("/execute", json=body(f"http-{number}"), headers=bearer(user))
        assert "event: end" in response.text
    call = worker.stub.Execute(pb.ExecuteRequest(job_id="grpc", prompt="x"), metadata=(("x-api-key", user.text),))
    assert [event.WhichOneof("event") async for event in call][-1] == "end"
    for path in ("/execute", "/v1/completions"):
        response = await gateway.http.post(path, content=b"{not read", headers=bearer(user))
        assert response.status_code == 429
        assert 60 <= int(response.headers["retry-after"]) <= 61
        assert response.json()["error"]["details"]["quota"] == "requests_per_minute"
    clock.now_s += int(response.headers["retry-after"])
    response = await gateway.http.post("/execute", json=body(), headers=bearer(user))
    assert "event: end" in response.text


async def test_tokens_beyond_the_limit_are_429_too(start_both: Any, tmp_path: Path) -> None:
    user = create_key("user", USER, tokens_per_minute=20)
    worker, gateway = await start_both(Guard(save(tmp_path / "keys.json", user), clock=FakeClock()))
    worker.fake.eager = True
    assert (await gateway.http.post("/execute", json=body(max_tokens=15), headers=bearer(user))).status_code == 200
    response = await gateway.http.post("/execute", json=body(max_tokens=15), headers=bearer(user))
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["details"]["quota"] == "tokens_per_minute"


async def test_a_revoked_key_ends_its_stream_with_an_error_frame(start_both: Any, tmp_path: Path) -> None:
    user = create_key("user", USER)
    path = save(tmp_path / "keys.json", user)
    guard = Guard(path)
    worker, gateway = await start_both(guard)
    async with gateway.http.stream("POST", "/execute", json=body(), headers=bearer(user)) as response:
        lines = response.aiter_lines()
        async for line in lines:
            if line == "event: started":
                break
        save(path)
        assert guard.reload() == 1
        rest = [line async for line in lines]
    assert "event: error" in rest
    assert any('"UNAUTHENTICATED"' in line for line in rest)
    assert (await gateway.http.post("/execute", json=body(), headers=bearer(user))).status_code == 401
    assert not worker.fake.jobs[0].live


async def test_another_keys_job_is_not_found_over_http(start_both: Any, tmp_path: Path) -> None:
    alice, bob = create_key("alice", USER), create_key("bob", USER)
    worker, gateway = await start_both(Guard(save(tmp_path / "keys.json", alice, bob)))
    async with gateway.http.stream("POST", "/execute", json=body(), headers=bearer(alice)) as response:
        lines = response.aiter_lines()
        async for line in lines:
            if line == "event: started":
                break
        cancel = {"json": {"job_id": "job-1"}}
        refused = await gateway.http.post("/cancel", **cancel, headers=bearer(bob))
        assert refused.json()["outcome"] == "not_found"
        assert worker.fake.jobs[0].live
        done = await gateway.http.post("/cancel", **cancel, headers=bearer(alice))
        assert done.json()["outcome"] == "cancelled"
        assert any('"CANCELLED"' in line for line in [line async for line in lines])


async def test_equal_ids_of_two_tenants_are_told_apart_on_several_workers(
    start_worker: Any, start_gateway: Any, tmp_path: Path
) -> None:
    alice, bob = create_key("alice", USER), create_key("bob", USER)
    path = save(tmp_path / "keys.json", alice, bob)
    workers = [await start_worker(guard=Guard(path)) for _ in range(2)]
    gateway = await start_gateway(*(worker.target for worker in workers))
    async with (
        gateway.http.stream("POST", "/execute", json=body("same"), headers=bearer(alice)),
        gateway.http.stream("POST", "/execute", json=body("same"), headers=bearer(bob)),
    ):
        assert [len(worker.fake.jobs) for worker in workers] == [1, 1]
        for who in (alice, bob):
            response = await gateway.http.post("/cancel", json={"job_id": "same"}, headers=bearer(who))
            assert response.json()["outcome"] == "cancelled"


async def started(lines: Any) -> str:
    """Reads a stream up to the payload of `started`."""
    async for line in lines:
        if line.startswith("data:"):
            return str(line)
    raise AssertionError("the stream ended")


async def test_an_equal_id_of_another_tenant_does_not_hide_a_detached_job(
    start_worker: Any, start_gateway: Any, tmp_path: Path
) -> None:
    alice, bob = create_key("alice", USER), create_key("bob", USER)
    path = save(tmp_path / "keys.json", alice, bob)
    workers = [await start_worker(guard=Guard(path)) for _ in range(2)]
    gateway = await start_gateway(*(worker.target for worker in workers))
    tokens = {alice: "a" * 32, bob: "b" * 32}
    for who, token in tokens.items():
        detached = body("same", detach=True, attach_token=token)
        async with gateway.http.stream("POST", "/execute", json=detached, headers=bearer(who)) as response:
            await started(response.aiter_lines())
    assert [len(worker.fake.jobs) for worker in workers] == [1, 1]
    for who, token in tokens.items():
        path_of_job = f"/execute/same?token={token}"
        async with gateway.http.stream("GET", path_of_job, headers=bearer(who)) as response:
            assert response.status_code == 200
            assert token in await started(response.aiter_lines())
        other = next(key for key in tokens if key is not who)
        # Not even with the secret.
        assert (await gateway.http.get(path_of_job, headers=bearer(other))).status_code == 404


async def test_an_equal_id_of_another_tenant_does_not_hide_a_job_from_cancel(
    start_worker: Any, start_gateway: Any, tmp_path: Path
) -> None:
    """Alice's first job of the id has finished where Bob's runs now; her second one runs elsewhere."""
    alice, bob = create_key("alice", USER), create_key("bob", USER)
    path = save(tmp_path / "keys.json", alice, bob)
    workers = [await start_worker(guard=Guard(path)) for _ in range(2)]
    gateway = await start_gateway(*(worker.target for worker in workers))
    for worker in workers:
        worker.fake.eager = True
    await gateway.http.post("/execute", json=body("same"), headers=bearer(alice))
    first = next(worker for worker in workers if worker.fake.jobs)
    (second,) = (worker for worker in workers if worker is not first)
    for worker in workers:
        worker.fake.eager = False
    async with (
        gateway.http.stream("POST", "/execute", json=body("same"), headers=bearer(alice)),
        gateway.http.stream("POST", "/execute", json=body("same"), headers=bearer(bob)),
    ):
        assert [len(worker.fake.jobs) for worker in (first, second)] == [2, 1]
        response = await gateway.http.post("/cancel", json={"job_id": "same"}, headers=bearer(alice))
        assert response.json()["outcome"] == "cancelled"
        assert not second.fake.jobs[0].live


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


async def test_a_gateway_apart_passes_the_key_on(start_worker: Any, start_gateway: Any, tmp_path: Path) -> None:
    """Without keys of its own it lets the worker decide, and tells its decision as it is."""
    user = create_key("user", USER, requests_per_minute=1)
    worker = await start_worker(guard=Guard(save(tmp_path / "keys.json", user), clock=FakeClock()))
    worker.fake.eager = True
    gateway = await start_gateway(worker.target, security=Security(Guard()))
    assert (await gateway.http.post("/execute", json=body())).status_code == 401
    assert "event: end" in (await gateway.http.post("/execute", json=body(), headers=bearer(user))).text
    response = await gateway.http.post("/execute", json=body("job-2"), headers=bearer(user))
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 60
    assert response.json()["error"]["details"]["quota"] == "requests_per_minute"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"allow_remote": True}, "allow_remote: needs API keys"),
        ({"target_cert_file": "x"}, "target_cert_file and target_key_file belong together"),
        ({"tls_cert_file": "x"}, "tls_cert_file: needs tls_key_file"),
        ({"target_ca_file": "/absent"}, "target_ca_file (/absent): cannot be read"),
        ({"api_keys_file": "/absent"}, "api_keys_file (/absent): cannot be read"),
    ],
)
def test_a_gateway_apart_says_what_its_settings_lack(flags: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_gateway_settings(flags, environ={}, check_files=file_problems)
    assert any(said in problem for problem in caught.value.problems)


@pytest.mark.parametrize("flag", ["api_keys_file", "workers_ask_keys"])
def test_a_gateway_apart_may_be_remote_where_somebody_asks_for_keys(flag: str) -> None:
    value: object = True if flag == "workers_ask_keys" else "x"
    assert load_gateway_settings({"host": "0.0.0.0", "allow_remote": True, flag: value}, environ={}).allow_remote


async def test_both_ports_of_a_process_share_keys_certificates_and_sighup(start: Any, tmp_path: Path) -> None:
    """`serve --http-port` with TLS and keys; the gateway inside reaches its worker past TLS."""
    ca = Authority(tmp_path)
    pair = ca.issue("server", (x509.DNSName("localhost"),))
    first, second = create_key("first", USER), create_key("second", USER)
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
    first, second = create_key("first", USER), create_key("second", USER)
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
