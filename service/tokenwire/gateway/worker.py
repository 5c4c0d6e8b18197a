"""One worker as the gateway sees it: its channel, its calls, and what it last said of itself."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tokenwire.client.errors import error_from_status
from tokenwire.client.request import channel_options
from tokenwire.errors import ERRORS, FieldViolation, TokenwireError
from tokenwire.observe.logging import get_logger
from tokenwire.rpc.validate import Limits
from tokenwire.v1 import inference_pb2 as pb
from tokenwire.v1 import inference_pb2_grpc as pb_grpc
from tokenwire.waiting import wait_until

Metadata = Sequence[tuple[str, str]]

POLL_SECONDS = 1.0
HEALTH_TIMEOUT_S = 5.0
CANCEL_TIMEOUT_S = 10.0
RETRY_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0)

# Codes of gRPC itself, for calls that never met our own errors.
_LIBRARY_CODES = {
    grpc.StatusCode.UNAVAILABLE: "UNAVAILABLE",
    grpc.StatusCode.DEADLINE_EXCEEDED: "INFERENCE_TIMEOUT",
    grpc.StatusCode.CANCELLED: "CANCELLED",
    grpc.StatusCode.UNAUTHENTICATED: "UNAUTHENTICATED",
    grpc.StatusCode.PERMISSION_DENIED: "PERMISSION_DENIED",
}


class Worker:
    """Made and used on one running event loop.

    Attributes:
        report: the worker's last answer to Health; None while it has not been reached.
        ready: whether it takes requests, by its health service's last word.
    """

    def __init__(self, target: str, credentials: grpc.ChannelCredentials | None = None) -> None:
        self.target = target
        self.report: pb.HealthResponse | None = None
        self.ready = False
        options = channel_options(target, [("grpc.primary_user_agent", "tokenwire-gateway")])
        self._channel = (
            grpc.aio.insecure_channel(target, options)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, options)
        )
        self._stub = pb_grpc.InferenceStub(self._channel)
        # The stub's type leaves Watch out.
        self._health_watch: Any = getattr(health_pb2_grpc.HealthStub(self._channel), "Watch")  # noqa: B009
        self._changed = asyncio.Event()
        self._tasks = (asyncio.ensure_future(self._watch()), asyncio.ensure_future(self._poll()))

    @property
    def model(self) -> str:
        return self.report.model if self.report is not None else ""

    @property
    def limits(self) -> Limits | None:
        """The bounds of a request, once the worker has told them."""
        if self.report is None or not self.report.HasField("limits"):
            return None
        told = self.report.limits
        return Limits(
            max_prompt_chars=told.max_prompt_chars,
            max_chat_messages=told.max_chat_messages,
            max_tokens_in=told.max_tokens_in,
            max_tokens_out=told.max_tokens_out,
            vocab_size=self.report.vocab_size,
            context_length=self.report.context_length,
            max_token_bytes=told.max_token_bytes,
            max_grammar_bytes=told.max_grammar_bytes,
        )

    def execute(self, request: pb.ExecuteRequest, metadata: Metadata) -> Any:
        """The gRPC call; reading from it gives `ExecuteEvent`s and, at its end, the status."""
        return self._stub.Execute(request, metadata=tuple(metadata))

    def attach(self, request: pb.AttachRequest, metadata: Metadata) -> Any:
        """As `execute`, for the stream of a detached job."""
        return self._stub.Attach(request, metadata=tuple(metadata))

    async def cancel(self, job_id: str, metadata: Metadata) -> pb.CancelResponse:
        """Raises TokenwireError where the worker refuses or cannot be asked."""
        try:
            response: pb.CancelResponse = await self._stub.Cancel(
                pb.CancelRequest(job_id=job_id), metadata=tuple(metadata), timeout=CANCEL_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error) from error
        return response

    async def close(self, grace_s: float = 0.0) -> None:
        """Lets running streams end within `grace_s` seconds, and closes the connection."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close(grace_s)

    async def _watch(self) -> None:
        """Follows readiness. A change is known at once, the figures of Health follow it."""
        failures = 0
        serving = health_pb2.HealthCheckResponse.SERVING
        while True:
            call: Any = self._health_watch(health_pb2.HealthCheckRequest(service="readiness"))
            try:
                async for response in call:
                    failures = 0
                    self._set_ready(response.status == serving)
            except grpc.aio.AioRpcError:
                pass  # it cannot be reached: ask again
            finally:
                call.cancel()
            self._set_ready(False)
            await asyncio.sleep(RETRY_SECONDS[min(failures, len(RETRY_SECONDS) - 1)])
            failures += 1

    def _set_ready(self, ready: bool) -> None:
        self._changed.set()
        if ready is not self.ready:
            self.ready = ready
            get_logger().info("worker_ready" if ready else "worker_not_ready", target=self.target)

    async def _poll(self) -> None:
        while True:
            self._changed.clear()
            try:
                self.report = await self._stub.Health(pb.HealthRequest(), timeout=HEALTH_TIMEOUT_S)
            except grpc.aio.AioRpcError:
                self.report = None
            await wait_until(self._changed, POLL_SECONDS)


def error_from_call(error: grpc.aio.AioRpcError, event: pb.Error | None = None) -> TokenwireError:
    """A failed call as the table's error.

    Args:
        event: the stream's `error` event, if it had one; it knows best.
    """
    told = error_from_status(error.code(), error.details(), error.initial_metadata(), error.trailing_metadata(), event)
    if told.code in ERRORS and (told.metadata or event is not None):
        return TokenwireError(
            told.code,
            told.message,
            fields=[
                FieldViolation(field.field, field.reason, field.reason.lower(), field.description)
                for field in told.violations
            ],
            limit=_number(told.metadata.get("limit")),
            actual=_number(told.metadata.get("actual")),
            phase=told.metadata.get("phase"),
            quota=told.metadata.get("quota"),
            cause=told.metadata.get("cause"),
            retry_after_ms=None if told.retry_after_s is None else int(told.retry_after_s * 1000),
        )
    # The library's own text may name addresses: it goes to the log only.
    get_logger().warning("worker_call_failed", status=error.code().name, message=error.details())
    code = _LIBRARY_CODES.get(error.code(), "INTERNAL")
    return TokenwireError(code, "no worker can be reached" if code == "UNAVAILABLE" else None)


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None
