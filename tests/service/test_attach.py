"""Detached jobs: they outlive their calls, and Attach gives the same stream again from any token on."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from service.helpers_attach import (
    TOKEN,
    WORDS,
    Request,
    attach,
    begin,
    collect,
    digest_of,
    ids_of,
    kinds,
    read,
    text_of,
)
from service.helpers_security import until
from tokenwire.engine.fake import FakeOutcome
from tokenwire.security.admission import Admission
from tokenwire.security.principal import Principal, Scope
from tokenwire.v1 import inference_pb2 as pb


def broken_fields(error: grpc.aio.AioRpcError) -> set[str]:
    status = rpc_status.from_call(error)
    assert status is not None
    bad_request = error_details_pb2.BadRequest()
    for detail in status.details:
        detail.Unpack(bad_request)
    return {violation.field for violation in bad_request.field_violations}


@pytest.fixture
async def worker(detaching: Any) -> Any:
    return await detaching()


@pytest.mark.parametrize("seen", range(len(WORDS) + 1))
async def test_a_broken_stream_goes_on_where_it_was(worker: Any, request_of: Request, seen: int) -> None:
    call = worker.stub.Execute(request_of(detach=True, attach_token=TOKEN))
    await read(call, 0)
    worker.fake.step(seen)
    before = await read(call, seen) if seen else []
    call.cancel()
    again = attach(worker, seen)
    assert (await read(again, 0))[0].started.attach_token == TOKEN
    worker.fake.step(len(WORDS))
    after, code = await collect(again)
    assert code is grpc.StatusCode.OK
    assert text_of(before) + text_of(after) == "".join(WORDS)
    assert ids_of(before) + ids_of(after) == list(range(len(WORDS)))
    assert [kind for kind in kinds(after) if kind != "token"] == ["metrics", "end"]
    assert after[-1].end.digest == digest_of(list(range(len(WORDS))))


async def test_every_event_proves_all_ids_so_far(worker: Any, request_of: Request) -> None:
    for detach in (False, True):
        call = worker.stub.Execute(request_of(f"job-{detach}", detach=detach))
        ids: list[int] = []
        await read(call, 0)
        for steps in (1, 3, 4):
            worker.fake.step(steps)
            for event in await read(call, steps):
                ids += event.token.ids
                if event.HasField("token"):
                    assert event.token.digest == digest_of(ids)[:16]
        events, _ = await collect(call)
        assert events[-1].end.digest == digest_of(ids)
        assert ids == list(range(len(WORDS)))


async def test_a_job_runs_on_without_its_client(worker: Any, request_of: Request) -> None:
    call = await begin(worker, request_of, 1)
    call.cancel()
    worker.fake.step(len(WORDS))
    await until(lambda: worker.engine.num_live == 0)
    events, code = await collect(attach(worker))
    assert code is grpc.StatusCode.OK
    # What waited travels in one event, of the same bytes.
    assert kinds(events) == ["started", "token", "metrics", "end"]
    assert events[1].token.digest == events[-1].end.digest[:16]
    assert (text_of(events), ids_of(events)) == ("".join(WORDS), list(range(len(WORDS))))
    # It stays to be read, from anywhere, until its grace time is over.
    for start in range(len(WORDS) + 1):
        events, code = await collect(attach(worker, start))
        assert code is grpc.StatusCode.OK
        assert text_of(events) == "".join(WORDS[start:])


async def test_the_calls_deadline_ends_the_call_and_not_the_job(worker: Any, request_of: Request) -> None:
    call = worker.stub.Execute(request_of(detach=True, attach_token=TOKEN), timeout=0.3)
    assert (await collect(call))[1] is grpc.StatusCode.DEADLINE_EXCEEDED
    assert worker.fake.jobs[0].live
    assert worker.fake.jobs[0].spec["timeout_ms"] > 200_000
    worker.fake.step(len(WORDS))
    assert text_of((await collect(attach(worker)))[0]) == "".join(WORDS)


async def test_without_detach_the_job_still_ends_with_its_call(worker: Any, request_of: Request) -> None:
    call = worker.stub.Execute(request_of())
    await read(call, 0)
    call.cancel()
    assert await asyncio.to_thread(worker.fake.jobs[0].cancelled.wait, 20)
    assert (await collect(attach(worker)))[1] is grpc.StatusCode.NOT_FOUND


async def test_the_worker_draws_a_secret_if_the_client_has_none(worker: Any, request_of: Request) -> None:
    tokens = set()
    for n in range(3):
        call = worker.stub.Execute(request_of(f"job-{n}", detach=True))
        tokens.add((await read(call, 0))[0].started.attach_token)
        worker.fake.step(len(WORDS))
        await collect(call)
    assert len(tokens) == 3
    assert all(len(token) >= 40 for token in tokens)
    plain = worker.stub.Execute(request_of("plain"))
    assert (await read(plain, 0))[0].started.attach_token == ""
    plain.cancel()


async def test_only_who_has_the_secret_may_attach(worker: Any, request_of: Request) -> None:
    await begin(worker, request_of, 2)
    answers = set()
    for job_id, token in (("job-1", "another-secret-of-16"), ("job-2", TOKEN), ("job-1", TOKEN + "x")):
        call = attach(worker, job_id=job_id, token=token)
        assert (await collect(call))[1] is grpc.StatusCode.NOT_FOUND
        answers.add(await call.details())
    assert len(answers) == 1, "the answer must not tell whether the job exists"


async def test_another_principal_may_not_attach_even_with_the_secret(
    worker: Any, request_of: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = "alice"

    def admission() -> Admission:
        return Admission(Principal(caller, caller, frozenset(Scope)), None, lambda _: None)

    monkeypatch.setattr("tokenwire.rpc.inference.current_admission", admission)
    await begin(worker, request_of, 2)
    caller = "mallory"
    assert (await collect(attach(worker)))[1] is grpc.StatusCode.NOT_FOUND
    # Nor may it stop the job, whose readers go on.
    answer = await worker.stub.Cancel(pb.CancelRequest(job_id="job-1"))
    assert answer.outcome == pb.CancelResponse.OUTCOME_NOT_FOUND
    caller = "alice"
    assert text_of(await read(attach(worker), 2)) == "".join(WORDS[:2])


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({"job_id": "bad id", "attach_token": TOKEN}, {"job_id"}),
        ({"job_id": "job-1"}, {"attach_token"}),
        ({"job_id": "job-1", "attach_token": "short"}, {"attach_token"}),
        ({"attach_token": "ä" * 20}, {"job_id", "attach_token"}),
    ],
)
async def test_a_malformed_attach_names_its_fields(worker: Any, fields: dict[str, str], refused: set[str]) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.stub.Attach(pb.AttachRequest(**fields)).read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert broken_fields(caught.value) == refused


@pytest.mark.parametrize("fields", [{"attach_token": TOKEN}, {"detach": True, "attach_token": "short"}])
async def test_a_secret_must_be_long_and_needs_detach(worker: Any, request_of: Request, fields: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.stub.Execute(request_of(**fields)).read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert broken_fields(caught.value) == {"attach_token"}


async def test_an_index_not_yet_produced_is_waited_for(worker: Any, request_of: Request) -> None:
    await begin(worker, request_of, 2)
    ahead = attach(worker, 5)
    assert kinds(await read(ahead, 0)) == ["started"]
    worker.fake.step(len(WORDS))
    events, code = await collect(ahead)
    assert code is grpc.StatusCode.OK
    assert text_of(events) == "".join(WORDS[5:])


async def test_an_index_beyond_the_end_is_refused(worker: Any, request_of: Request) -> None:
    await begin(worker, request_of, 1)
    waiting = attach(worker, len(WORDS) + 1)
    await read(waiting, 0)
    worker.fake.step(len(WORDS))
    events, code = await collect(waiting)
    assert (kinds(events), code) == (["metrics", "error"], grpc.StatusCode.INVALID_ARGUMENT)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await attach(worker, len(WORDS) + 1).read()
    assert broken_fields(caught.value) == {"from_index"}


async def test_several_may_read_and_leave_as_they_please(worker: Any, request_of: Request) -> None:
    first = await begin(worker, request_of, 2)
    others = [attach(worker, start) for start in range(7)]
    for call in others:
        await read(call, 0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:  # eight read
        await attach(worker).read()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "grpc-retry-pushback-ms" in dict(caught.value.trailing_metadata() or ())
    first.cancel()
    others.pop().cancel()
    worker.fake.step(len(WORDS))
    for start, call in enumerate(others):
        events, code = await collect(call)
        assert code is grpc.StatusCode.OK
        assert text_of(events) == "".join(WORDS[start:])


async def test_cancel_ends_every_reader_and_no_token_follows(worker: Any, request_of: Request) -> None:
    first = await begin(worker, request_of, 2)
    second = attach(worker)
    await read(second, 2)
    worker.fake.step()
    response = await worker.stub.Cancel(pb.CancelRequest(job_id="job-1"))
    assert (response.outcome, response.tokens_out) == (pb.CancelResponse.OUTCOME_CANCELLED, 3)
    for call in (first, second):
        events, code = await collect(call)
        assert code is grpc.StatusCode.CANCELLED
        assert kinds(events)[-2:] == ["metrics", "error"]
        assert " two" not in text_of(events)
    events, code = await collect(attach(worker))
    assert (kinds(events), code) == (["started", "metrics", "error"], grpc.StatusCode.CANCELLED)
    assert not worker.fake.jobs[0].live


async def test_cancel_reaches_a_job_that_nobody_reads(worker: Any, request_of: Request) -> None:
    (await begin(worker, request_of, 2)).cancel()
    response = await worker.stub.Cancel(pb.CancelRequest(job_id="job-1"))
    assert response.outcome == pb.CancelResponse.OUTCOME_CANCELLED
    assert not worker.fake.jobs[0].live
    assert await worker.engine.wait_idle(10)


async def test_a_job_that_fails_fails_for_every_reader(worker: Any, request_of: Request) -> None:
    call = await begin(worker, request_of, 2)
    worker.fake.jobs[0].finish(FakeOutcome(error_code="VRAM_OOM", error_message="out of memory"))
    for reader in (call, attach(worker, 2), attach(worker)):
        events, code = await collect(reader)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (events[-1].error.code, events[-1].error.message) == ("VRAM_OOM", "out of memory")
        assert kinds(events)[-2:] == ["metrics", "error"]


async def test_a_refused_request_leaves_nothing_to_attach_to(worker: Any, request_of: Request) -> None:
    call = worker.stub.Execute(request_of(detach=True, attach_token=TOKEN, temperature=9))
    assert (await collect(call))[1] is grpc.StatusCode.INVALID_ARGUMENT
    assert (await collect(attach(worker)))[1] is grpc.StatusCode.NOT_FOUND
    assert worker.engine.num_live == 0


async def test_an_id_can_be_used_again_once_its_job_ended(worker: Any, request_of: Request) -> None:
    first = await begin(worker, request_of)
    duplicate = worker.stub.Execute(request_of(detach=True))
    assert (await collect(duplicate))[1] is grpc.StatusCode.ALREADY_EXISTS
    worker.fake.step(len(WORDS))
    await collect(first)
    # Somebody else's job of the same id displaces nothing; the owner's own does.
    other = worker.stub.Execute(request_of(detach=True, attach_token="another-secret-of-16", max_tokens=2))  # noqa: S106
    await read(other, 0)
    worker.fake.step(2)
    assert text_of((await collect(other))[0]) == "".join(WORDS[:2])
    assert text_of((await collect(attach(worker)))[0]) == "".join(WORDS)
    mine = await begin(worker, request_of, max_tokens=3)
    worker.fake.step(3)
    await collect(mine)
    assert text_of((await collect(attach(worker)))[0]) == "".join(WORDS[:3])


async def test_the_engines_end_reaches_readers_and_stops_new_jobs(worker: Any, request_of: Request) -> None:
    call = await begin(worker, request_of, 2)
    assert await worker.engine.drain(0.01) == 1
    digest = digest_of([0, 1])[:16]
    # whoever had the two tokens, in this call or before it, goes on after them.
    for reader, last_digest in ((call, digest), (attach(worker, 1), digest), (attach(worker, 2), "")):
        events, code = await collect(reader)
        assert code is grpc.StatusCode.UNAVAILABLE
        assert events[-1].error.code == "UNAVAILABLE"
        assert events[-1].error.resume == pb.ResumePoint(from_index=2, digest=last_digest)
