"""The guard at the gRPC port: who gets in, what each may do, what others can learn, and when a caller must wait."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from tokenwire.security.guard import Guard
from tokenwire.security.key_file import write_keys
from tokenwire.security.keys import KeyRecord, KeyRing, NewKey, create_key
from tokenwire.security.principal import Quota, Scope
from tokenwire.v1 import inference_pb2 as pb

Request = Callable[..., pb.ExecuteRequest]
EXECUTE = "/tokenwire.v1.Inference/Execute"
DAY_S = 86400


class Keys:
    """A file of keys that a test changes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ring = KeyRing()
        self.write()

    def add(self, name: str = "k", *scopes: Scope, **fields: Any) -> NewKey:
        new = create_key(name, scopes or (Scope.EXECUTE, Scope.CANCEL), **fields)
        self.ring.keys[new.record.id] = new.record
        self.write()
        return new

    def replace(self, record: KeyRecord, **changes: Any) -> None:
        self.ring.keys[record.id] = record.model_copy(update=changes)
        self.write()

    def remove(self, new: NewKey) -> None:
        del self.ring.keys[new.record.id]
        self.write()

    def write(self) -> None:
        write_keys(self.path, self.ring)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys.json")


def bearer(new: NewKey) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {new.text}"),)


async def failure_of(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (run_to_end(call) if hasattr(call, "read") else asyncio.wait_for(call, 20))
    error: grpc.aio.AioRpcError = caught.value
    return error


def details(error: grpc.aio.AioRpcError, kind: Any) -> Any:
    status = rpc_status.from_call(error)
    assert status is not None
    for detail in status.details:
        found = kind()
        if detail.Unpack(found):
            return found
    return None


async def run_to_end(call: Any) -> list[pb.ExecuteEvent]:
    events = []
    while (event := await asyncio.wait_for(call.read(), 20)) is not grpc.aio.EOF:
        events.append(event)
    return events


async def test_with_keys_nothing_answers_without_one_but_health(
    start_worker: Any, keys: Keys, request_of: Request
) -> None:
    new = keys.add()
    worker = await start_worker(guard=Guard(keys.path))
    error = await failure_of(worker.stub.Execute(request_of()))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert details(error, error_details_pb2.ErrorInfo).reason == "UNAUTHENTICATED"
    assert dict(error.trailing_metadata())["x-correlation-id"]
    error = await failure_of(worker.stub.Cancel(pb.CancelRequest(job_id="x")))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert (await worker.stub.Health(pb.HealthRequest())).phase == "ready"
    assert (await worker.health.Check(health_pb2.HealthCheckRequest())).status == 1
    assert worker.fake.jobs == []

    worker.fake.eager = True
    assert (await run_to_end(worker.stub.Execute(request_of(), metadata=bearer(new))))[-1].HasField("end")
    events = await run_to_end(worker.stub.Execute(request_of(), metadata=(("x-api-key", new.text),)))
    assert events[-1].HasField("end")
    lower = (("authorization", f"bearer {new.text}"),)
    assert (await run_to_end(worker.stub.Execute(request_of(), metadata=lower)))[-1].HasField("end")


async def test_an_empty_file_of_keys_lets_nobody_in(start_worker: Any, keys: Keys, request_of: Request) -> None:
    worker = await start_worker(guard=Guard(keys.path))
    assert (await failure_of(worker.stub.Execute(request_of()))).code() is grpc.StatusCode.UNAUTHENTICATED


async def test_an_open_worker_ignores_credentials(start_worker: Any, request_of: Request) -> None:
    worker = await start_worker(guard=Guard())
    worker.fake.eager = True
    call = worker.stub.Execute(request_of(), metadata=(("authorization", "Bearer whatever"),))
    assert (await run_to_end(call))[-1].HasField("end")
    assert worker.fake.jobs[0].spec["cache_salt"] == b""


async def test_r14_every_wrong_credential_gets_the_same_answer(
    start_worker: Any, keys: Keys, request_of: Request
) -> None:
    """R14: no key, a wrong one and an expired one cannot be told apart by the text."""
    new = keys.add()
    over = keys.add("over", expires_at=datetime.fromtimestamp(DAY_S, timezone.utc))
    worker = await start_worker(guard=Guard(keys.path))
    sent: list[tuple[tuple[str, str], ...]] = [
        (),
        bearer(over),
        (("authorization", ""),),
        (("authorization", new.text),),
        (("authorization", f"Basic {new.text}"),),
        (("authorization", f"Bearer  {new.text}"),),
        (("authorization", f"Bearer {new.text} x"),),
        (("authorization", f"Bearer {new.text},Bearer {new.text}"),),
        (("authorization", f"Bearer {new.text.upper()}"),),
        (("authorization", "Bearer " + "x" * 4000),),
        (("x-api-key", f"Bearer {new.text}"),),
        (("x-api-key", new.text[:-1]),),
    ]
    seen = set()
    for metadata in sent:
        error = await failure_of(worker.stub.Execute(request_of(), metadata=metadata))
        info = details(error, error_details_pb2.ErrorInfo)
        seen.add((error.code(), error.details(), info.reason, tuple(sorted(info.metadata.items()))))
    assert len(seen) == 1
    assert worker.fake.jobs == []


@pytest.mark.parametrize("places", ["authorization authorization", "x-api-key x-api-key", "authorization x-api-key"])
async def test_r13_more_than_one_credential_is_ambiguous(
    start_worker: Any, keys: Keys, request_of: Request, places: str
) -> None:
    """R13: even two right ones."""
    new = keys.add()
    worker = await start_worker(guard=Guard(keys.path))
    text = {"authorization": f"Bearer {new.text}", "x-api-key": new.text}
    error = await failure_of(
        worker.stub.Execute(request_of(), metadata=tuple((name, text[name]) for name in places.split()))
    )
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert details(error, error_details_pb2.ErrorInfo).metadata["cause"] == "AMBIGUOUS_CREDENTIALS"


async def reflect(worker: Any, metadata: Any, version: str) -> list[str]:
    method = worker.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    call = method(metadata=metadata, timeout=20)
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    answer = await call.read()
    if answer is grpc.aio.EOF:
        await call
    await call.done_writing()
    return [service.name for service in answer.list_services_response.service]


ALLOWED = {
    # By method: which of none, a wrong key, a user's key and an admin's key get in.
    "/tokenwire.v1.Inference/Execute": "ua",
    "/tokenwire.v1.Inference/Cancel": "ua",
    "/tokenwire.v1.Inference/Attach": "ua",
    "/tokenwire.v1.Inference/Health": "-wua",
    "/grpc.health.v1.Health/Check": "-wua",
    "/grpc.health.v1.Health/Watch": "-wua",
    "/grpc.health.v1.Health/List": "-wua",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": "ua",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": "ua",
}


async def test_r15_every_method_answers_only_whom_it_may(start_worker: Any, keys: Keys) -> None:
    """R15, and deny by default: all methods that reflection knows, with four kinds of credential, against a table."""
    user, admin = keys.add("user"), keys.add("admin", *Scope)
    worker = await start_worker(guard=Guard(keys.path))
    wrong = (("x-api-key", create_key("x").text),)
    credentials = {"-": (), "w": wrong, "u": bearer(user), "a": bearer(admin)}
    pool = reflection_pb2_grpc.ServerReflectionStub(worker.channel)
    refused = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}
    checked = 0
    for service in await reflect(worker, bearer(user), "v1"):
        call = pool.ServerReflectionInfo(metadata=bearer(user), timeout=20)
        await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=service))
        files = (await call.read()).file_descriptor_response.file_descriptor_proto
        call.cancel()
        for method in methods_of(service, files):
            got = ""
            for letter, metadata in credentials.items():
                code = await status_of(worker, method, metadata)
                if code not in refused:
                    got += letter
                elif letter in "-w":
                    assert code is grpc.StatusCode.UNAUTHENTICATED
                else:
                    assert code is grpc.StatusCode.PERMISSION_DENIED
            expected = "a" if method.startswith("/tokenwire.v1.AdminService/") else ALLOWED.get(method, "")
            assert got == expected, method
            checked += 1
    assert checked >= 7


def methods_of(service: str, files: Any) -> list[str]:
    from google.protobuf import descriptor_pb2

    found = []
    for data in files:
        file = descriptor_pb2.FileDescriptorProto.FromString(data)
        for declared in file.service:
            if f"{file.package}.{declared.name}" == service:
                found += [f"/{service}/{method.name}" for method in declared.method]
    return found


async def status_of(worker: Any, method: str, metadata: Any) -> grpc.StatusCode:
    """The status of a call with a message that means nothing; OK if it goes on for longer than a moment."""
    call = worker.channel.unary_stream(method, None, None)(b"", metadata=metadata, timeout=2)
    try:
        message = await call.read()
        if message is not grpc.aio.EOF:
            call.cancel()
            return grpc.StatusCode.OK
        return await call.code()  # type: ignore[no-any-return]
    except grpc.aio.AioRpcError as error:
        return error.code()


@pytest.mark.parametrize(
    ("scopes", "method", "message"),
    [
        ((Scope.CANCEL, Scope.ADMIN), "Execute", pb.ExecuteRequest(job_id="x", prompt="x")),
        ((Scope.EXECUTE, Scope.HEALTH), "Cancel", pb.CancelRequest(job_id="x")),
    ],
)
async def test_a_scope_that_a_key_lacks_is_denied(
    start_worker: Any, keys: Keys, scopes: tuple[Scope, ...], method: str, message: Any
) -> None:
    new = keys.add("k", *scopes)
    worker = await start_worker(guard=Guard(keys.path))
    error = await failure_of(getattr(worker.stub, method)(message, metadata=bearer(new)))
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert details(error, error_details_pb2.ErrorInfo).reason == "PERMISSION_DENIED"


async def test_a_refusal_does_not_wait_for_the_message(start_worker: Any, keys: Keys) -> None:
    """A caller without a key costs no message, however large or slow: the answer comes before the first byte."""
    worker = await start_worker(guard=Guard(keys.path))
    call = worker.channel.stream_stream(EXECUTE, None, None)()
    assert (await failure_of(call)).code() is grpc.StatusCode.UNAUTHENTICATED


async def test_anothers_job_is_not_found_and_its_id_is_free(start_worker: Any, keys: Keys, request_of: Request) -> None:
    alice, bob = keys.add("alice"), keys.add("bob")
    worker = await start_worker(guard=Guard(keys.path))
    hers = worker.stub.Execute(request_of("same"), metadata=bearer(alice))
    assert (await hers.read()).HasField("started")

    async def cancel(who: NewKey) -> int:
        answer = await worker.stub.Cancel(pb.CancelRequest(job_id="same"), metadata=bearer(who))
        return int(answer.outcome)

    outcomes = pb.CancelResponse
    assert await cancel(bob) == outcomes.OUTCOME_NOT_FOUND
    # An id that another uses is neither taken nor shown to be.
    his = worker.stub.Execute(request_of("same"), metadata=bearer(bob))
    assert (await his.read()).HasField("started")
    error = await failure_of(worker.stub.Execute(request_of("same"), metadata=bearer(bob)))
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    assert await cancel(bob) == outcomes.OUTCOME_CANCELLED
    assert (await failure_of(his)).code() is grpc.StatusCode.CANCELLED
    worker.fake.step(3)
    assert (await run_to_end(hers))[-1].HasField("end")
    assert await cancel(alice) == outcomes.OUTCOME_ALREADY_FINISHED
    keys.remove(bob)


async def test_keys_of_one_tenant_own_its_jobs_together(start_worker: Any, keys: Keys, request_of: Request) -> None:
    old, new = keys.add("old", tenant="acme"), keys.add("new", tenant="acme")
    worker = await start_worker(guard=Guard(keys.path))
    call = worker.stub.Execute(request_of("job"), metadata=bearer(old))
    assert (await call.read()).HasField("started")
    answer = await worker.stub.Cancel(pb.CancelRequest(job_id="job"), metadata=bearer(new))
    assert answer.outcome == pb.CancelResponse.OUTCOME_CANCELLED
    await failure_of(call)


async def test_tenants_have_cached_prompts_of_their_own(start_worker: Any, keys: Keys, request_of: Request) -> None:
    who = [keys.add("a"), keys.add("b"), keys.add("c", tenant="acme"), keys.add("d", tenant="acme")]
    worker = await start_worker(guard=Guard(keys.path))
    worker.fake.eager = True
    for number, new in enumerate((*who, who[0])):
        await run_to_end(worker.stub.Execute(request_of(f"job-{number}"), metadata=bearer(new)))
    salts = [job.spec["cache_salt"] for job in worker.fake.jobs]
    assert len(set(salts)) == 3
    assert salts[2] == salts[3]
    assert salts[0] == salts[4]
    assert b"" not in salts


async def test_a_revoked_key_ends_its_streams_and_no_others(start_worker: Any, keys: Keys, request_of: Request) -> None:
    """W-8: the stream ends with an `error` event and its status; the job is stopped."""
    revoked, kept = keys.add("revoked"), keys.add("kept")
    guard = Guard(keys.path)
    worker = await start_worker(guard=guard)
    gone = worker.stub.Execute(request_of("gone"), metadata=bearer(revoked))
    stays = worker.stub.Execute(request_of("stays"), metadata=bearer(kept))
    for call in (gone, stays):
        assert (await call.read()).HasField("started")
    worker.fake.step()
    assert (await gone.read()).token.t == "Hello"
    keys.remove(revoked)
    assert guard.reload() == 1
    events = [await asyncio.wait_for(gone.read(), 20) for _ in range(2)]
    assert [event.WhichOneof("event") for event in events] == ["metrics", "error"]
    assert events[1].error.code == "UNAUTHENTICATED"
    assert (await failure_of(gone)).code() is grpc.StatusCode.UNAUTHENTICATED
    assert {job.spec["job_id"]: job.live for job in worker.fake.jobs} == {"gone": False, "stays": True}
    again = await failure_of(worker.stub.Execute(request_of("again"), metadata=bearer(revoked)))
    assert again.code() is grpc.StatusCode.UNAUTHENTICATED
    worker.fake.step(2)
    assert (await run_to_end(stays))[-1].HasField("end")
    await until(lambda: guard.num_open == 0)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(4000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it does not come about")


async def test_a_key_revoked_while_its_prompt_is_read_starts_no_job(
    start_worker: Any, keys: Keys, request_of: Request
) -> None:
    new = keys.add()
    guard = Guard(keys.path)
    worker = await start_worker(guard=guard)
    worker.text.gate.clear()
    call = worker.stub.Execute(request_of(), metadata=bearer(new))
    assert await asyncio.to_thread(worker.text.entered.acquire, timeout=20)
    keys.remove(new)
    assert guard.reload() == 1
    worker.text.gate.set()
    assert (await failure_of(call)).code() is grpc.StatusCode.UNAUTHENTICATED
    assert worker.fake.jobs == []


@pytest.mark.parametrize("change", ["scope", "tenant", "secret", "expiry"])
async def test_a_key_that_lost_something_loses_its_streams(
    start_worker: Any, keys: Keys, request_of: Request, change: str
) -> None:
    new = keys.add()
    guard = Guard(keys.path)
    worker = await start_worker(guard=guard)
    call = worker.stub.Execute(request_of(), metadata=bearer(new))
    assert (await call.read()).HasField("started")
    changes: dict[str, Any] = {
        "scope": {"scopes": (Scope.CANCEL,)},
        "tenant": {"tenant": "other"},
        "secret": {"sha256": "0" * 64},
        "expiry": {"expires_at": datetime.fromtimestamp(DAY_S, timezone.utc)},
    }
    keys.replace(new.record, **changes[change])
    assert guard.reload() == 1
    assert (await failure_of(call)).code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_key_that_gained_something_keeps_its_streams(
    start_worker: Any, keys: Keys, request_of: Request
) -> None:
    new = keys.add()
    guard = Guard(keys.path)
    worker = await start_worker(guard=guard)
    call = worker.stub.Execute(request_of(), metadata=bearer(new))
    assert (await call.read()).HasField("started")
    keys.replace(new.record, scopes=tuple(Scope), requests_per_minute=1)
    assert guard.reload() == 0
    worker.fake.step(3)
    assert (await run_to_end(call))[-1].HasField("end")


@pytest.mark.parametrize("content", [b"", b"{", json.dumps({"version": 9}).encode()])
async def test_p3_a_bad_file_at_reload_keeps_the_old_keys(
    start_worker: Any, keys: Keys, request_of: Request, content: bytes
) -> None:
    """P3: the old file stays in force."""
    new = keys.add()
    guard = Guard(keys.path)
    worker = await start_worker(guard=guard)
    keys.path.write_bytes(content)
    with pytest.raises(Exception, match=r"keys\.json"):
        guard.reload()
    worker.fake.eager = True
    assert (await run_to_end(worker.stub.Execute(request_of(), metadata=bearer(new))))[-1].HasField("end")


async def test_an_open_reflection_stream_ends_with_its_key(start_worker: Any, keys: Keys) -> None:
    new = keys.add()
    guard = Guard(keys.path)
    worker = await start_worker(guard=guard)
    call = reflection_pb2_grpc.ServerReflectionStub(worker.channel).ServerReflectionInfo(
        metadata=bearer(new), timeout=20
    )
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    await call.write(ask)
    assert (await call.read()).list_services_response.service
    keys.remove(new)
    assert guard.reload() == 1
    await call.write(ask)
    assert (await failure_of(call)).code() is grpc.StatusCode.UNAUTHENTICATED


class FakeClock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def retry_after_ms(error: grpc.aio.AioRpcError) -> int:
    """What RetryInfo says, which the pushback trailer repeats."""
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    delay = details(error, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds()
    assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == str(delay)
    return int(delay)


async def test_p16_a_rate_is_refused_with_when_to_come_back(start_worker: Any, keys: Keys, request_of: Request) -> None:
    """P16, W-30: RESOURCE_EXHAUSTED + RetryInfo + QuotaFailure + pushback; the time it names is right."""
    clock = FakeClock()
    new, other = keys.add("a"), keys.add("b", requests_per_minute=0)
    worker = await start_worker(guard=Guard(keys.path, each=Quota(requests_per_minute=2), clock=clock))
    worker.fake.eager = True
    for number in range(2):
        await run_to_end(worker.stub.Execute(request_of(f"a-{number}"), metadata=bearer(new)))
    error = await failure_of(worker.stub.Execute(request_of(), metadata=bearer(new)))
    quota = details(error, error_details_pb2.QuotaFailure).violations[0]
    assert quota.subject == "requests_per_minute"
    info = details(error, error_details_pb2.ErrorInfo)
    assert (info.reason, info.metadata["limit"], info.metadata["retriable"]) == ("OVERLOADED", "2", "true")
    # Cancel and health have no rate, and a key with limits of its own is not held to the others'.
    await worker.stub.Cancel(pb.CancelRequest(job_id="x"), metadata=bearer(new))
    for number in range(5):
        await run_to_end(worker.stub.Execute(request_of(f"b-{number}"), metadata=bearer(other)))
    clock.now_s += retry_after_ms(error) / 1000
    await run_to_end(worker.stub.Execute(request_of(), metadata=bearer(new)))


async def test_open_requests_are_capped_and_come_free_however_they_end(
    start_worker: Any, keys: Keys, request_of: Request
) -> None:
    new = keys.add(concurrent_requests=2)
    worker = await start_worker(guard=Guard(keys.path))
    for round_ in range(5):
        calls = [worker.stub.Execute(request_of(f"{round_}-{n}"), metadata=bearer(new)) for n in range(2)]
        for call in calls:
            assert (await call.read()).HasField("started")
        assert retry_after_ms(await failure_of(worker.stub.Execute(request_of("x"), metadata=bearer(new)))) == 1000
        calls[0].cancel()
        await worker.stub.Cancel(pb.CancelRequest(job_id=f"{round_}-1"), metadata=bearer(new))
        await failure_of(calls[1])
        await until(lambda: not any(job.live for job in worker.fake.jobs))
        # A request that is refused by its fields leaves no place taken either.
        bad = await failure_of(worker.stub.Execute(request_of("y", temperature=9), metadata=bearer(new)))
        assert bad.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_tokens_are_counted_as_they_were_used(start_worker: Any, keys: Keys, request_of: Request) -> None:
    """A generation reserves prompt + max_tokens before it starts, and counts what it came to when it ended."""
    clock = FakeClock()
    new = keys.add(tokens_per_minute=100)
    worker = await start_worker(guard=Guard(keys.path, clock=clock))
    worker.fake.eager = True
    for number in range(2):  # 5 in + 3 out each, of 5 + 80
        await run_to_end(worker.stub.Execute(request_of(f"j{number}", max_tokens=80), metadata=bearer(new)))
    error = await failure_of(worker.stub.Execute(request_of("no", max_tokens=80), metadata=bearer(new)))
    assert details(error, error_details_pb2.ErrorInfo).metadata["quota"] == "tokens_per_minute"
    assert len(worker.fake.jobs) == 2
    await run_to_end(worker.stub.Execute(request_of("yes", max_tokens=79), metadata=bearer(new)))
    clock.now_s += retry_after_ms(error) / 1000
    await run_to_end(worker.stub.Execute(request_of("again", max_tokens=80), metadata=bearer(new)))


async def test_limits_hold_on_an_open_worker_too(start_worker: Any, request_of: Request) -> None:
    worker = await start_worker(guard=Guard(overall=Quota(requests_per_minute=1), clock=FakeClock()))
    worker.fake.eager = True
    await run_to_end(worker.stub.Execute(request_of("a")))
    retry_after_ms(await failure_of(worker.stub.Execute(request_of("b"))))


DETACHED = {"detach": True, "attach_token": "a-token-of-many-letters"}


async def test_a_detached_job_counts_as_open_until_it_ends(start_worker: Any, keys: Keys, request_of: Request) -> None:
    """Else a caller could leave one after the other behind and have as many run as it likes."""
    new = keys.add(concurrent_requests=1)
    guard = Guard(keys.path)
    worker = await start_worker(guard=guard)
    call = worker.stub.Execute(request_of("left", **DETACHED), metadata=bearer(new))
    assert (await call.read()).HasField("started")
    call.cancel()
    for _ in range(3):
        retry_after_ms(await failure_of(worker.stub.Execute(request_of("next"), metadata=bearer(new))))
    worker.fake.step(3)
    await until(lambda: guard.num_open == 0)
    worker.fake.eager = True
    await run_to_end(worker.stub.Execute(request_of("next"), metadata=bearer(new)))
    attach = pb.AttachRequest(job_id="left", attach_token=DETACHED["attach_token"])
    assert (await run_to_end(worker.stub.Attach(attach, metadata=bearer(new))))[-1].HasField("end")


async def test_a_detached_job_settles_its_tokens_when_it_ends(
    start_worker: Any, keys: Keys, request_of: Request
) -> None:
    new = keys.add(tokens_per_minute=100)
    worker = await start_worker(guard=Guard(keys.path, clock=FakeClock()))
    call = worker.stub.Execute(request_of("left", max_tokens=90, **DETACHED), metadata=bearer(new))
    assert (await call.read()).HasField("started")
    call.cancel()
    wanted = request_of("next", max_tokens=85)
    retry_after_ms(await failure_of(worker.stub.Execute(wanted, metadata=bearer(new))))
    worker.fake.step(3)
    await until(lambda: worker.engine.num_live == 0)
    worker.fake.eager = True
    assert (await run_to_end(worker.stub.Execute(wanted, metadata=bearer(new))))[-1].HasField("end")


async def test_a_revoked_key_ends_what_it_left_behind_and_what_it_reads(
    start_worker: Any, keys: Keys, request_of: Request
) -> None:
    revoked, kept = keys.add("revoked", tenant="acme"), keys.add("kept", tenant="acme")
    guard = Guard(keys.path)
    worker = await start_worker(guard=guard)
    for job_id, key in (("gone", revoked), ("stays", kept)):
        call = worker.stub.Execute(request_of(job_id, **DETACHED), metadata=bearer(key))
        assert (await call.read()).HasField("started")
        call.cancel()
    attach = pb.AttachRequest(job_id="stays", attach_token=DETACHED["attach_token"])
    reads = worker.stub.Attach(attach, metadata=bearer(revoked))
    assert (await reads.read()).HasField("started")
    keys.remove(revoked)
    assert guard.reload() == 2
    await until(lambda: not next(job for job in worker.fake.jobs if job.spec["job_id"] == "gone").live)
    worker.fake.step(3)
    events = [await asyncio.wait_for(reads.read(), 20) for _ in range(2)]
    assert [event.WhichOneof("event") for event in events] == ["metrics", "error"]
    assert (await failure_of(reads)).code() is grpc.StatusCode.UNAUTHENTICATED
    assert (await run_to_end(worker.stub.Attach(attach, metadata=bearer(kept))))[-1].HasField("end")


async def test_a_detached_job_is_nobody_elses(start_worker: Any, keys: Keys, request_of: Request) -> None:
    """Another tenant may neither attach, even with the secret, nor stop it, whose readers go on."""
    alice, bob = keys.add("alice"), keys.add("bob")
    worker = await start_worker(guard=Guard(keys.path))
    call = worker.stub.Execute(request_of("job", **DETACHED), metadata=bearer(alice))
    assert (await call.read()).HasField("started")
    attach = pb.AttachRequest(job_id="job", attach_token=DETACHED["attach_token"])
    assert (await failure_of(worker.stub.Attach(attach, metadata=bearer(bob)))).code() is grpc.StatusCode.NOT_FOUND
    answer = await worker.stub.Cancel(pb.CancelRequest(job_id="job"), metadata=bearer(bob))
    assert answer.outcome == pb.CancelResponse.OUTCOME_NOT_FOUND
    worker.fake.step(3)
    assert (await run_to_end(call))[-1].HasField("end")


async def test_wrong_keys_spend_nobodys_rate_and_no_memory(start_worker: Any, keys: Keys, request_of: Request) -> None:
    new = keys.add()
    guard = Guard(keys.path, each=Quota(requests_per_minute=1), overall=Quota(requests_per_minute=1))
    worker = await start_worker(guard=guard)
    worker.fake.eager = True
    for _ in range(200):
        error = await failure_of(worker.stub.Execute(request_of(), metadata=bearer(create_key("x"))))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert (guard.limiter.num_remembered, guard.num_open) == (0, 0)
    assert (await run_to_end(worker.stub.Execute(request_of(), metadata=bearer(new))))[-1].HasField("end")
