"""Detached jobs of a known text, and calls that read them."""

from __future__ import annotations

import asyncio
import hashlib
import struct
from collections.abc import Callable
from typing import Any

import grpc

from tokenwire.v1 import inference_pb2 as pb

Request = Callable[..., pb.ExecuteRequest]

TOKEN = "a-secret-of-the-client"  # noqa: S105
WORDS = ["Grüße", " 🌍", " one", " two", " three", " four", " five", " six"]


def kinds(events: list[pb.ExecuteEvent]) -> list[str]:
    return [event.WhichOneof("event") for event in events]


def text_of(events: list[pb.ExecuteEvent]) -> str:
    return "".join(event.token.t for event in events)


def ids_of(events: list[pb.ExecuteEvent]) -> list[int]:
    return [token_id for event in events for token_id in event.token.ids]


def digest_of(ids: list[int]) -> str:
    return hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).hexdigest()


def attach(worker: Any, from_index: int = 0, job_id: str = "job-1", token: str = TOKEN) -> Any:
    return worker.stub.Attach(pb.AttachRequest(job_id=job_id, from_index=from_index, attach_token=token))


async def collect(call: Any) -> tuple[list[pb.ExecuteEvent], grpc.StatusCode]:
    events = []
    try:
        while (event := await asyncio.wait_for(call.read(), 20)) is not grpc.aio.EOF:
            events.append(event)
    except grpc.aio.AioRpcError as error:
        return events, error.code()
    return events, await call.code()


async def read(call: Any, num_tokens: int) -> list[pb.ExecuteEvent]:
    """The events up to this many tokens of a stream."""
    events: list[pb.ExecuteEvent] = []
    while len(ids_of(events)) < num_tokens or not events:
        events.append(await asyncio.wait_for(call.read(), 20))
        assert events[-1] is not grpc.aio.EOF
    return events


async def begin(worker: Any, request_of: Request, num_tokens: int = 0, **fields: Any) -> Any:
    """A detached job that produced `num_tokens`, and the call that reads it."""
    call = worker.stub.Execute(request_of(detach=True, attach_token=TOKEN, **fields))
    await read(call, 0)
    worker.fake.step(num_tokens)
    await read(call, num_tokens) if num_tokens else None
    return call
