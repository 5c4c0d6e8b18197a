"""The guard at the gRPC port: who gets in, and what each may do."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from service.helpers_security import Keys, bearer, details, execute, failure_of, run_to_end
from tokenwire.security.guard import Guard
from tokenwire.security.keys import create_key
from tokenwire.security.principal import Scope
from tokenwire.v1 import inference_pb2 as pb

Request = Callable[..., pb.ExecuteRequest]
EXECUTE = "/tokenwire.v1.Inference/Execute"
DAY_S = 86400


async def test_with_keys_nothing_answers_without_one_but_health(
    start_guarded: Any, keys: Keys, request_of: Request
) -> None:
    new = keys.add()
    worker = await start_guarded()
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
    assert (await run_to_end(execute(worker, new)))[-1].HasField("end")
    events = await run_to_end(worker.stub.Execute(request_of(), metadata=(("x-api-key", new.text),)))
    assert events[-1].HasField("end")
    lower = (("authorization", f"bearer {new.text}"),)
    assert (await run_to_end(worker.stub.Execute(request_of(), metadata=lower)))[-1].HasField("end")


async def test_an_empty_file_of_keys_lets_nobody_in(start_guarded: Any, request_of: Request) -> None:
    worker = await start_guarded()
    assert (await failure_of(worker.stub.Execute(request_of()))).code() is grpc.StatusCode.UNAUTHENTICATED


async def test_an_open_worker_ignores_credentials(start_worker: Any, request_of: Request) -> None:
    worker = await start_worker(guard=Guard())
    worker.fake.eager = True
    call = worker.stub.Execute(request_of(), metadata=(("authorization", "Bearer whatever"),))
    assert (await run_to_end(call))[-1].HasField("end")
    assert worker.fake.jobs[0].spec["cache_salt"] == b""


async def test_r14_every_wrong_credential_gets_the_same_answer(
    start_guarded: Any, keys: Keys, request_of: Request
) -> None:
    """R14: no key, a wrong one and an expired one cannot be told apart by the text."""
    new = keys.add()
    over = keys.add("over", expires_at=datetime.fromtimestamp(DAY_S, timezone.utc))
    worker = await start_guarded()
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
    start_guarded: Any, keys: Keys, request_of: Request, places: str
) -> None:
    """R13: even two right ones."""
    new = keys.add()
    worker = await start_guarded()
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


async def test_r15_every_method_answers_only_whom_it_may(start_guarded: Any, keys: Keys) -> None:
    """R15, and deny by default: all methods that reflection knows, with four kinds of credential, against a table."""
    user, admin = keys.add("user"), keys.add("admin", *Scope)
    worker = await start_guarded()
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
    start_guarded: Any, keys: Keys, scopes: tuple[Scope, ...], method: str, message: Any
) -> None:
    new = keys.add("k", *scopes)
    worker = await start_guarded()
    error = await failure_of(getattr(worker.stub, method)(message, metadata=bearer(new)))
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert details(error, error_details_pb2.ErrorInfo).reason == "PERMISSION_DENIED"


async def test_a_refusal_does_not_wait_for_the_message(start_guarded: Any) -> None:
    """A caller without a key costs no message, however large or slow: the answer comes before the first byte."""
    worker = await start_guarded()
    call = worker.channel.stream_stream(EXECUTE, None, None)()
    assert (await failure_of(call)).code() is grpc.StatusCode.UNAUTHENTICATED
