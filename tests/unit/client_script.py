"""What a scripted worker does at each call of a client that tries again, and the client that calls."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2

from scripted_worker import Worker, refuse
from tokenwire.client import (
    AsyncClient,
    Client,
    Event,
    RetryPolicy,
)
from tokenwire.v1 import inference_pb2 as pb

QUICK = RetryPolicy(attempts=3, first_wait_s=0.001, most_wait_s=0.5, resume_for_s=5)
WORDS = ["Grüße", " one", " two", " three", " four"]


def digest_of(count: int) -> str:
    return hashlib.sha256(struct.pack(f"<{count}I", *range(count))).hexdigest()


def started(job_id: str = "job", seed: int = 5) -> pb.ExecuteEvent:
    return pb.ExecuteEvent(started=pb.Started(job_id=job_id, model="m", seed=seed))


def token(first: int, end: int, *, digest: str | None = None) -> pb.ExecuteEvent:
    text = "".join(WORDS[first:end])
    digest = digest_of(end)[:16] if digest is None else digest
    return pb.ExecuteEvent(token=pb.Token(t=text, i=first, ids=range(first, end), digest=digest))


def ending(count: int = len(WORDS)) -> list[pb.ExecuteEvent]:
    end = pb.End(tokens_out=count, stop_reason=pb.STOP_REASON_EOS, digest=digest_of(count))
    return [pb.ExecuteEvent(metrics=pb.Metrics(tokens_out=count)), pb.ExecuteEvent(end=end)]


Step = Callable[[Any, grpc.ServicerContext], Iterator[pb.ExecuteEvent]]


def sends(*events: pb.ExecuteEvent) -> Step:
    return lambda request, context: iter(events)


def breaks(*events: pb.ExecuteEvent) -> Step:
    """Sends events, then ends as gRPC reports a lost connection: a status without the worker's details."""

    def step(request: Any, context: grpc.ServicerContext) -> Iterator[pb.ExecuteEvent]:
        yield from events
        context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    return step


def refuses(code: int, reason: str, *details: Any) -> Step:
    def step(request: Any, context: grpc.ServicerContext) -> Iterator[pb.ExecuteEvent]:
        info = error_details_pb2.ErrorInfo(reason=reason, domain="tokenwire")
        refuse(context, code, "refused", info, *details)
        return iter(())

    return step


def retry_info(seconds: float) -> error_details_pb2.RetryInfo:
    return error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(nanos=int(seconds * 1e9)))


NOT_FOUND = refuses(code_pb2.NOT_FOUND, "NOT_FOUND")


def play(worker: Worker, *steps: Step) -> None:
    """Every call, Execute or Attach, takes the next step; one too many is a bug of the client's."""
    left = list(steps)

    def script(request: Any, context: grpc.ServicerContext) -> Iterator[pb.ExecuteEvent]:
        if not left:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "a call too many")
        return left.pop(0)(request, context)

    worker.script = script


def run(worker: Worker, retry: RetryPolicy = QUICK, **params: Any) -> list[Event]:
    """The events by both clients, which must agree."""
    with Client(worker.target, retry=retry) as client:
        return list(client.execute("a", job_id="job", **params))


async def run_async(worker: Worker, retry: RetryPolicy = QUICK, **params: Any) -> list[Event]:
    async with AsyncClient(worker.target, retry=retry) as client:
        return [event async for event in client.execute("a", job_id="job", **params)]


def methods(worker: Worker) -> list[str]:
    return [type(request).__name__.removesuffix("Request") for request in worker.requests]
