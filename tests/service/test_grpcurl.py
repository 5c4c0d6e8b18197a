"""grpcurl and `buf curl` talk to the worker with no proto file: reflection in both versions, and every method."""

from __future__ import annotations

import asyncio
import json
import shutil
import sysconfig
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2

SERVICES = {
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
    "tokenwire.v1.Inference",
}


def tool(name: str) -> str:
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    assert path is not None, f"{name} is a development dependency and must be installed"
    return path


async def run(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, err.decode()
    return out.decode()


def messages(text: str) -> list[Any]:
    """The JSON values that stand one after the other in `text`."""
    decoder, values, place = json.JSONDecoder(), [], 0
    while text[place:].strip():
        place += len(text[place:]) - len(text[place:].lstrip())
        value, place = decoder.raw_decode(text, place)
        values.append(value)
    return values


Call = Callable[[str, dict[str, Any]], Any]


@pytest.fixture(params=["grpcurl", "buf curl"])
def call(request: pytest.FixtureRequest, worker: Any) -> Call:
    """Calls a method with JSON; gives the messages that came back."""

    async def invoke(method: str, body: dict[str, Any]) -> list[Any]:
        data = json.dumps(body)
        if request.param == "grpcurl":
            return messages(await run(tool("grpcurl"), "-plaintext", "-d", data, worker.target, method))
        command = (tool("buf"), "curl", "--protocol", "grpc", "--http2-prior-knowledge", "-d", data)
        return messages(await run(*command, f"http://{worker.target}/{method}"))

    return invoke


async def test_execute_cancel_and_health(call: Call, worker: Any) -> None:
    worker.fake.eager = True
    events = await call("tokenwire.v1.Inference/Execute", {"jobId": "a", "prompt": "Hi", "seed": 5})
    assert [next(iter(event)) for event in events] == ["started", "token", "metrics", "end"]
    assert events[1]["token"]["t"] == "Hello world!"
    [cancelled] = await call("tokenwire.v1.Inference/Cancel", {"jobId": "a"})
    assert cancelled["outcome"] == "OUTCOME_ALREADY_FINISHED"
    [health] = await call("tokenwire.v1.Inference/Health", {})
    assert health["status"] == "STATUS_HEALTHY"
    [check] = await call("grpc.health.v1.Health/Check", {"service": "readiness"})
    assert check["status"] == "SERVING"


async def test_grpcurl_lists_and_describes_everything(worker: Any) -> None:
    listed = await run(tool("grpcurl"), "-plaintext", worker.target, "list")
    assert set(listed.split()) == SERVICES
    described = await run(tool("grpcurl"), "-plaintext", worker.target, "describe")
    for service in SERVICES:
        assert f"{service} is a service" in described
    message = await run(tool("grpcurl"), "-plaintext", worker.target, "describe", "tokenwire.v1.ExecuteRequest")
    assert "optional uint64 seed = 12" in message


async def test_buf_curl_lists_every_method(worker: Any) -> None:
    command = (tool("buf"), "curl", "--protocol", "grpc", "--http2-prior-knowledge")
    listed = await run(*command, "--list-services", f"http://{worker.target}")
    assert set(listed.split()) == SERVICES
    methods = await run(*command, "--list-methods", f"http://{worker.target}")
    assert {"tokenwire.v1.Inference/Execute", "tokenwire.v1.Inference/Cancel"} <= set(methods.split())


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_both_versions_of_reflection_list_and_describe_both(worker: Any, version: str) -> None:
    ask = worker.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    requests = [reflection_pb2.ServerReflectionRequest(list_services="")]
    requests += [reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in sorted(SERVICES)]
    requests += [reflection_pb2.ServerReflectionRequest(file_containing_symbol="no.such.Symbol")]
    call = ask(iter(requests), timeout=20)
    responses = [response async for response in call]
    assert {service.name for service in responses[0].list_services_response.service} == SERVICES
    for response in responses[1:-1]:
        assert response.file_descriptor_response.file_descriptor_proto
    assert responses[-1].error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
