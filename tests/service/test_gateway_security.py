"""The HTTP port's keys and limits: the same decision as at the gRPC port, and one count for both."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.routing import Route

from service.helpers_gateway import body
from service.helpers_security import FakeClock, Keys, bearer
from tokenwire.config_sources import ConfigError, load_gateway_settings, load_settings
from tokenwire.gateway.app import _router
from tokenwire.gateway.context import Gateway
from tokenwire.gateway.pool import WorkerPool
from tokenwire.security.guard import VOUCHED_KEY, Guard
from tokenwire.security.keys import create_key
from tokenwire.security.policy import ADMIN, PUBLIC, route_rule
from tokenwire.security.principal import Quota, Scope
from tokenwire.security.setup import Security, file_problems
from tokenwire.v1 import inference_pb2 as pb

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
    start_both: Any, keys: Keys, headers: list[tuple[str, str]], path: str
) -> None:
    """H23, R13, R14; the body is neither read nor checked."""
    keys.add()
    worker, gateway = await start_both()
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


async def test_a_key_works_on_every_path_that_it_may_use(start_both: Any, keys: Keys) -> None:
    user = keys.add("user")
    worker, gateway = await start_both()
    worker.fake.eager = True
    for headers in (bearer(user), {"x-api-key": user.text}, {"authorization": f"bearer {user.text}"}):
        response = await gateway.http.post("/execute", json=body(), headers=headers)
        assert "event: end" in response.text
    chat = {"model": "test-model", "messages": [{"role": "user", "content": "Hi"}]}
    assert (await gateway.http.post("/v1/chat/completions", json=chat, headers=bearer(user))).status_code == 200
    assert (await gateway.http.get("/v1/models", headers=bearer(user))).status_code == 200
    assert (await gateway.http.post("/cancel", json={"job_id": "x"}, headers=bearer(user))).status_code == 202
    assert len({job.spec["cache_salt"] for job in worker.fake.jobs}) == 1


async def test_probes_are_free_and_nothing_else_is(start_both: Any, keys: Keys) -> None:
    _, gateway = await start_both(overall=Quota(requests_per_minute=1))
    for path in ("/health", "/health/live", "/health/ready", "/health/startup"):
        for _ in range(3):
            assert (await gateway.http.get(path)).status_code == 200
    for path in ("/v1/models", "/execute/x", "/metrics", "/shutdown", "/no/such/path", "/healthz", "/v1/health"):
        assert (await gateway.http.get(path)).status_code == 401, path


async def test_every_route_is_in_the_policy() -> None:
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


async def test_h20_a_disguised_path_reaches_nothing(start_both: Any, keys: Keys) -> None:
    """H20, over the wire and with a valid key."""
    user = keys.add("user")
    _, gateway = await start_both()
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


async def test_a_key_without_the_scope_is_403(start_both: Any, keys: Keys) -> None:
    reader = keys.add("reader", Scope.CANCEL)
    _, gateway = await start_both()
    response = await gateway.http.post("/execute", json=body(), headers=bearer(reader))
    assert (response.status_code, response.json()["error"]["code"]) == (403, "PERMISSION_DENIED")
    response = await gateway.http.post("/v1/completions", json={}, headers=bearer(reader))
    assert (response.status_code, response.json()["error"]["type"]) == (403, "permission_error")


async def test_a_rate_is_one_for_both_ports_and_a_refusal_says_when(start_both: Any, keys: Keys) -> None:
    """W-30: 429 + Retry-After; a request counts once, whichever port it came through."""
    clock, user = FakeClock(), keys.add("user")
    worker, gateway = await start_both(each=Quota(requests_per_minute=3), clock=clock)
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


async def test_tokens_beyond_the_limit_are_429_too(start_both: Any, keys: Keys) -> None:
    user = keys.add("user", tokens_per_minute=20)
    worker, gateway = await start_both(clock=FakeClock())
    worker.fake.eager = True
    assert (await gateway.http.post("/execute", json=body(max_tokens=15), headers=bearer(user))).status_code == 200
    response = await gateway.http.post("/execute", json=body(max_tokens=15), headers=bearer(user))
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["details"]["quota"] == "tokens_per_minute"


async def test_a_gateway_apart_passes_the_key_on(start_guarded: Any, start_gateway: Any, keys: Keys) -> None:
    """Without keys of its own it lets the worker decide, and tells its decision as it is."""
    user = keys.add("user", requests_per_minute=1)
    worker = await start_guarded(clock=FakeClock())
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
