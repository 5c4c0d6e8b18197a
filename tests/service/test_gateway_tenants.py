"""The HTTP port: whose a job is, also where several workers serve, and what a lost key ends."""

from __future__ import annotations

from typing import Any

from service.helpers_gateway import body, started
from service.helpers_security import Keys, bearer


async def test_a_revoked_key_ends_its_stream_with_an_error_frame(start_both: Any, keys: Keys) -> None:
    user = keys.add("user")
    worker, gateway = await start_both()
    async with gateway.http.stream("POST", "/execute", json=body(), headers=bearer(user)) as response:
        lines = response.aiter_lines()
        await started(lines)
        keys.remove(user)
        assert worker.guard.reload() == 1
        rest = [line async for line in lines]
    assert "event: error" in rest
    assert any('"UNAUTHENTICATED"' in line for line in rest)
    assert (await gateway.http.post("/execute", json=body(), headers=bearer(user))).status_code == 401
    assert not worker.fake.jobs[0].live


async def test_another_keys_job_is_not_found_over_http(start_both: Any, keys: Keys) -> None:
    alice, bob = keys.add("alice"), keys.add("bob")
    worker, gateway = await start_both()
    async with gateway.http.stream("POST", "/execute", json=body(), headers=bearer(alice)) as response:
        lines = response.aiter_lines()
        await started(lines)
        cancel = {"json": {"job_id": "job-1"}}
        refused = await gateway.http.post("/cancel", **cancel, headers=bearer(bob))
        assert refused.json()["outcome"] == "not_found"
        assert worker.fake.jobs[0].live
        done = await gateway.http.post("/cancel", **cancel, headers=bearer(alice))
        assert done.json()["outcome"] == "cancelled"
        assert any('"CANCELLED"' in line for line in [line async for line in lines])


async def test_equal_ids_of_two_tenants_are_told_apart_on_several_workers(start_two: Any, keys: Keys) -> None:
    alice, bob = keys.add("alice"), keys.add("bob")
    workers, gateway = await start_two()
    async with (
        gateway.http.stream("POST", "/execute", json=body("same"), headers=bearer(alice)),
        gateway.http.stream("POST", "/execute", json=body("same"), headers=bearer(bob)),
    ):
        assert [len(worker.fake.jobs) for worker in workers] == [1, 1]
        for who in (alice, bob):
            response = await gateway.http.post("/cancel", json={"job_id": "same"}, headers=bearer(who))
            assert response.json()["outcome"] == "cancelled"


async def test_an_equal_id_of_another_tenant_does_not_hide_a_detached_job(start_two: Any, keys: Keys) -> None:
    alice, bob = keys.add("alice"), keys.add("bob")
    workers, gateway = await start_two()
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


async def test_an_equal_id_of_another_tenant_does_not_hide_a_job_from_cancel(start_two: Any, keys: Keys) -> None:
    """Alice's first job of the id has finished where Bob's runs now; her second one runs elsewhere."""
    alice, bob = keys.add("alice"), keys.add("bob")
    workers, gateway = await start_two()
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
