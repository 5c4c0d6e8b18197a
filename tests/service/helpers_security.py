"""What the tests of the guard share: a file of keys that they change, and calls that fail."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status

from tokenwire.security.key_file import write_keys
from tokenwire.security.keys import KeyRecord, KeyRing, NewKey, create_key
from tokenwire.security.principal import Scope
from tokenwire.v1 import inference_pb2 as pb

DETACHED = {"detach": True, "attach_token": "a-token-of-many-letters"}


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


class FakeClock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def save(path: Path, *keys: NewKey) -> Path:
    """Makes a file of exactly these keys."""
    write_keys(path, KeyRing(key.record for key in keys))
    return path


def bearer(new: NewKey) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {new.text}"),)


def execute(worker: Any, key: NewKey, job_id: str = "job-1", **fields: Any) -> Any:
    """A call in a key's name."""
    return worker.stub.Execute(pb.ExecuteRequest(job_id=job_id, **{"prompt": "Hello", **fields}), metadata=bearer(key))


async def started(worker: Any, key: NewKey, job_id: str = "job-1", **fields: Any) -> Any:
    """A call in a key's name whose job runs."""
    call = execute(worker, key, job_id, **fields)
    assert (await call.read()).HasField("started")
    return call


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


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(4000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it does not come about")
