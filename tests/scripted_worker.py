"""A worker that answers as a test scripts it, on a real port: the other end for client and command-line tests."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, status_pb2
from grpc_status import rpc_status

from tokenwire.v1 import inference_pb2 as pb
from tokenwire.v1 import inference_pb2_grpc as pb_grpc

# What Execute and Attach do.
Script = Callable[[Any, grpc.ServicerContext], Iterator[pb.ExecuteEvent]]

TIMEOUT_S = 20


def happy(request: pb.ExecuteRequest, context: grpc.ServicerContext) -> Iterator[pb.ExecuteEvent]:
    started = pb.Started(job_id=request.job_id, model="m", seed=2**64 - 1, prompt_tokens=3, cached_tokens=2)
    started.started_at.FromJsonString("2030-01-02T03:04:05Z")
    yield pb.ExecuteEvent(started=started)
    yield pb.ExecuteEvent()  # a kind that this client does not know
    yield pb.ExecuteEvent(token=pb.Token(t="Grüße", i=0, ids=[7, 8]))
    top = pb.TopLogprob(id=10, t="?", raw=b"\xf0", logprob=-1.5)
    logprob = pb.TokenLogprob(id=9, t=" 🌍", raw=" 🌍".encode(), logprob=-0.5, top=[top])
    yield pb.ExecuteEvent(token=pb.Token(t=" 🌍", i=2, ids=[9], logprobs=[logprob]))
    yield pb.ExecuteEvent(metrics=pb.Metrics(tokens_in=3, tokens_out=3, first_token_ms=1.5, tokens_per_second=100))
    yield pb.ExecuteEvent(end=pb.End(tokens_out=3, decode_time_ms=20, stop_reason=pb.STOP_REASON_EOS, digest="d"))


HEALTHY = pb.HealthResponse(
    status=pb.HealthResponse.STATUS_HEALTHY,
    model="m",
    resident=True,
    quant_kind="Q4_1",
    vocab_size=49152,
    context_length=8192,
    device="cpu",
    pool_utilization=0.25,
    phase="ready",
    load_percent=100,
)


class Worker(pb_grpc.InferenceServicer):
    def __init__(self) -> None:
        self.script: Script = happy
        self.requests: list[Any] = []
        self.cancelled: list[str] = []
        self.metadata: dict[str, str | bytes] = {}
        self.time_remaining: float | None = None
        self.call_ended = threading.Event()
        self.health = HEALTHY
        self.target = ""

    def Execute(self, request: pb.ExecuteRequest, context: grpc.ServicerContext) -> Iterator[pb.ExecuteEvent]:
        self.requests.append(request)
        self.metadata = dict(context.invocation_metadata())
        self.time_remaining = context.time_remaining()
        context.add_callback(self.call_ended.set)
        yield from self.script(request, context)

    def Attach(self, request: pb.AttachRequest, context: grpc.ServicerContext) -> Iterator[pb.ExecuteEvent]:
        self.requests.append(request)
        yield from self.script(request, context)

    def Cancel(self, request: pb.CancelRequest, context: grpc.ServicerContext) -> pb.CancelResponse:
        if request.job_id == "bad id":
            refuse(context, code_pb2.INVALID_ARGUMENT, "the job id is malformed")
        self.cancelled.append(request.job_id)
        return pb.CancelResponse(outcome=pb.CancelResponse.OUTCOME_CANCELLED, tokens_out=4)

    def Health(self, request: pb.HealthRequest, context: grpc.ServicerContext) -> pb.HealthResponse:
        return self.health


def refuse(context: grpc.ServicerContext, code: int, message: str, *details: Message, correlation_id: str = "") -> None:
    status = status_pb2.Status(code=code, message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    refusal = rpc_status.to_status(status)
    # As the worker does: only trailing metadata is sure to reach every client.
    trailing = (*refusal.trailing_metadata, *((("x-correlation-id", correlation_id),) if correlation_id else ()))
    context.abort_with_status(refusal._replace(trailing_metadata=trailing))


def until_cancelled(request: pb.ExecuteRequest, context: grpc.ServicerContext) -> Iterator[pb.ExecuteEvent]:
    yield pb.ExecuteEvent(started=pb.Started(job_id=request.job_id))
    ended = threading.Event()
    if not context.add_callback(ended.set):
        return
    assert ended.wait(TIMEOUT_S)


@contextlib.contextmanager
def running_worker() -> Iterator[Worker]:
    worker = Worker()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    pb_grpc.add_InferenceServicer_to_server(worker, server)
    worker.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield worker
    finally:
        server.stop(0).wait()
