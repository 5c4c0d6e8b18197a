"""The guard at the gRPC port: whose a job is, what others can learn, and what a lost key ends."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime, timezone
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from service.helpers_security import DETACHED, Keys, bearer, execute, failure_of, run_to_end, started, until
from tokenwire.security.keys import NewKey
from tokenwire.security.principal import Scope
from tokenwire.v1 import inference_pb2 as pb

DAY_S = 86400


async def test_anothers_job_is_not_found_and_its_id_is_free(start_guarded: Any, keys: Keys) -> None:
    alice, bob = keys.add("alice"), keys.add("bob")
    worker = await start_guarded()
    hers = await started(worker, alice, "same")

    async def cancel(who: NewKey) -> int:
        answer = await worker.stub.Cancel(pb.CancelRequest(job_id="same"), metadata=bearer(who))
        return int(answer.outcome)

    outcomes = pb.CancelResponse
    assert await cancel(bob) == outcomes.OUTCOME_NOT_FOUND
    # An id that another uses is neither taken nor shown to be.
    his = await started(worker, bob, "same")
    error = await failure_of(execute(worker, bob, "same"))
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    assert await cancel(bob) == outcomes.OUTCOME_CANCELLED
    assert (await failure_of(his)).code() is grpc.StatusCode.CANCELLED
    worker.fake.step(3)
    assert (await run_to_end(hers))[-1].HasField("end")
    assert await cancel(alice) == outcomes.OUTCOME_ALREADY_FINISHED
    keys.remove(bob)


async def test_keys_of_one_tenant_own_its_jobs_together(start_guarded: Any, keys: Keys) -> None:
    old, new = keys.add("old", tenant="acme"), keys.add("new", tenant="acme")
    worker = await start_guarded()
    call = await started(worker, old, "job")
    answer = await worker.stub.Cancel(pb.CancelRequest(job_id="job"), metadata=bearer(new))
    assert answer.outcome == pb.CancelResponse.OUTCOME_CANCELLED
    await failure_of(call)


async def test_tenants_have_cached_prompts_of_their_own(start_guarded: Any, keys: Keys) -> None:
    who = [keys.add("a"), keys.add("b"), keys.add("c", tenant="acme"), keys.add("d", tenant="acme")]
    worker = await start_guarded()
    worker.fake.eager = True
    for number, new in enumerate((*who, who[0])):
        await run_to_end(execute(worker, new, f"job-{number}"))
    salts = [job.spec["cache_salt"] for job in worker.fake.jobs]
    assert len(set(salts)) == 3
    assert salts[2] == salts[3]
    assert salts[0] == salts[4]
    assert b"" not in salts


async def test_a_revoked_key_ends_its_streams_and_no_others(start_guarded: Any, keys: Keys) -> None:
    """W-8: the stream ends with an `error` event and its status; the job is stopped."""
    revoked, kept = keys.add("revoked"), keys.add("kept")
    worker = await start_guarded()
    gone, stays = await started(worker, revoked, "gone"), await started(worker, kept, "stays")
    worker.fake.step()
    assert (await gone.read()).token.t == "Hello"
    keys.remove(revoked)
    assert worker.guard.reload() == 1
    events = [await asyncio.wait_for(gone.read(), 20) for _ in range(2)]
    assert [event.WhichOneof("event") for event in events] == ["metrics", "error"]
    assert events[1].error.code == "UNAUTHENTICATED"
    assert (await failure_of(gone)).code() is grpc.StatusCode.UNAUTHENTICATED
    assert {job.spec["job_id"]: job.live for job in worker.fake.jobs} == {"gone": False, "stays": True}
    again = await failure_of(execute(worker, revoked, "again"))
    assert again.code() is grpc.StatusCode.UNAUTHENTICATED
    worker.fake.step(2)
    assert (await run_to_end(stays))[-1].HasField("end")
    await until(lambda: worker.guard.num_open == 0)


async def test_a_key_revoked_while_its_prompt_is_read_starts_no_job(start_guarded: Any, keys: Keys) -> None:
    new = keys.add()
    worker = await start_guarded()
    worker.text.gate.clear()
    call = execute(worker, new)
    assert await asyncio.to_thread(worker.text.entered.acquire, timeout=20)
    keys.remove(new)
    assert worker.guard.reload() == 1
    worker.text.gate.set()
    assert (await failure_of(call)).code() is grpc.StatusCode.UNAUTHENTICATED
    assert worker.fake.jobs == []


@pytest.mark.parametrize("change", ["scope", "tenant", "secret", "expiry"])
async def test_a_key_that_lost_something_loses_its_streams(start_guarded: Any, keys: Keys, change: str) -> None:
    new = keys.add()
    worker = await start_guarded()
    call = await started(worker, new)
    changes: dict[str, Any] = {
        "scope": {"scopes": (Scope.CANCEL,)},
        "tenant": {"tenant": "other"},
        "secret": {"sha256": "0" * 64},
        "expiry": {"expires_at": datetime.fromtimestamp(DAY_S, timezone.utc)},
    }
    keys.replace(new.record, **changes[change])
    assert worker.guard.reload() == 1
    assert (await failure_of(call)).code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_key_that_gained_something_keeps_its_streams(start_guarded: Any, keys: Keys) -> None:
    new = keys.add()
    worker = await start_guarded()
    call = await started(worker, new)
    keys.replace(new.record, scopes=tuple(Scope), requests_per_minute=1)
    assert worker.guard.reload() == 0
    worker.fake.step(3)
    assert (await run_to_end(call))[-1].HasField("end")


@pytest.mark.parametrize("content", [b"", b"{", json.dumps({"version": 9}).encode()])
async def test_p3_a_bad_file_at_reload_keeps_the_old_keys(start_guarded: Any, keys: Keys, content: bytes) -> None:
    """P3: the old file stays in force."""
    new = keys.add()
    worker = await start_guarded()
    keys.path.write_bytes(content)
    with pytest.raises(Exception, match=r"keys\.json"):
        worker.guard.reload()
    worker.fake.eager = True
    assert (await run_to_end(execute(worker, new)))[-1].HasField("end")


async def test_an_open_reflection_stream_ends_with_its_key(start_guarded: Any, keys: Keys) -> None:
    new = keys.add()
    worker = await start_guarded()
    call = reflection_pb2_grpc.ServerReflectionStub(worker.channel).ServerReflectionInfo(
        metadata=bearer(new), timeout=20
    )
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    await call.write(ask)
    assert (await call.read()).list_services_response.service
    keys.remove(new)
    assert worker.guard.reload() == 1
    await call.write(ask)
    assert (await failure_of(call)).code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_revoked_key_ends_what_it_left_behind_and_what_it_reads(start_guarded: Any, keys: Keys) -> None:
    revoked, kept = keys.add("revoked", tenant="acme"), keys.add("kept", tenant="acme")
    worker = await start_guarded()
    for job_id, key in (("gone", revoked), ("stays", kept)):
        (await started(worker, key, job_id, **DETACHED)).cancel()
    attach = pb.AttachRequest(job_id="stays", attach_token=DETACHED["attach_token"])
    reads = worker.stub.Attach(attach, metadata=bearer(revoked))
    assert (await reads.read()).HasField("started")
    keys.remove(revoked)
    assert worker.guard.reload() == 2
    await until(lambda: not next(job for job in worker.fake.jobs if job.spec["job_id"] == "gone").live)
    worker.fake.step(3)
    events = [await asyncio.wait_for(reads.read(), 20) for _ in range(2)]
    assert [event.WhichOneof("event") for event in events] == ["metrics", "error"]
    assert (await failure_of(reads)).code() is grpc.StatusCode.UNAUTHENTICATED
    assert (await run_to_end(worker.stub.Attach(attach, metadata=bearer(kept))))[-1].HasField("end")


async def test_a_detached_job_is_nobody_elses(start_guarded: Any, keys: Keys) -> None:
    """Another tenant may neither attach, even with the secret, nor stop it, whose readers go on."""
    alice, bob = keys.add("alice"), keys.add("bob")
    worker = await start_guarded()
    call = await started(worker, alice, "job", **DETACHED)
    attach = pb.AttachRequest(job_id="job", attach_token=DETACHED["attach_token"])
    assert (await failure_of(worker.stub.Attach(attach, metadata=bearer(bob)))).code() is grpc.StatusCode.NOT_FOUND
    answer = await worker.stub.Cancel(pb.CancelRequest(job_id="job"), metadata=bearer(bob))
    assert answer.outcome == pb.CancelResponse.OUTCOME_NOT_FOUND
    worker.fake.step(3)
    assert (await run_to_end(call))[-1].HasField("end")
