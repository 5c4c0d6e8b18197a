"""The asyncio client: the same calls as `tokenwire.client.sync`, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from tokenwire.client.auth import key_metadata
from tokenwire.client.errors import TokenwireRpcError, error_from_rpc
from tokenwire.client.events import (
    CancelResult,
    Generation,
    HealthReport,
    cancel_from_proto,
    health_from_proto,
)
from tokenwire.client.request import (
    CANCEL_TIMEOUT_S,
    CLOSE_TIMEOUT_S,
    DEFAULT_TARGET,
    HEALTH_TIMEOUT_S,
    Message,
    SamplingParams,
    build_request,
    call_metadata,
    channel_options,
)
from tokenwire.client.retry import DEFAULT_RETRY, RetryPolicy
from tokenwire.client.session import Request, Session
from tokenwire.client.streams import AsyncExecuteStream
from tokenwire.v1 import inference_pb2 as pb
from tokenwire.v1 import inference_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class AsyncClient:
    """A connection to one worker, made and used inside one running event loop.

    Args:
        target: `host:port`, or any gRPC target.
        credentials: for TLS, as `channel_credentials` makes them; None is plain text.
        api_key: shown with every call; a worker reads it in clear unless there is TLS.
        metadata: sent with every call.
        timeout_s: deadline of a generation in seconds; None waits as long as the worker allows.
        options: gRPC channel options beside, or instead of, the client's own.
        retry: when calls are made again; `NO_RETRY` reports every failure at once.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        api_key: str | None = None,
        metadata: Sequence[tuple[str, str]] = (),
        timeout_s: float | None = None,
        options: Sequence[tuple[str, int | str]] = (),
        retry: RetryPolicy = DEFAULT_RETRY,
    ) -> None:
        self._metadata = (*key_metadata(api_key), *metadata)
        self._timeout_s = timeout_s
        self._retry = retry
        self._cancels: set[Any] = set()
        self._channel = (
            grpc.aio.insecure_channel(target, channel_options(target, options))
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, channel_options(target, options))
        )
        self._stub = pb_grpc.InferenceStub(self._channel)

    def execute(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        job_id: str | None = None,
        timeout_s: float | None = None,
        correlation_id: str | None = None,
        detach: bool = False,
        **params: Unpack[SamplingParams],
    ) -> AsyncExecuteStream:
        """Starts a generation; returns at once, errors come from the stream.

        Args:
            prompt, messages, token_ids: exactly one: text, a conversation, or token ids used as they are.
            job_id: unique among the worker's live jobs; a UUID if absent.
            timeout_s: the whole generation's deadline, in place of the client's.
            correlation_id: names the call in the worker's log; the worker draws one if absent.
            detach: keep the job if the connection breaks, and take its stream up again; after a restart of the worker
                the answer is generated anew, to the same bytes. Digests prove that it is the same stream.
            params: see SamplingParams; what is absent keeps the worker's default.
        """
        request = build_request(prompt, messages, token_ids, job_id, params, detach=detach)
        return self._stream(request, timeout_s, correlation_id)

    def attach(
        self,
        job_id: str,
        attach_token: str,
        from_index: int = 0,
        *,
        timeout_s: float | None = None,
        correlation_id: str | None = None,
    ) -> AsyncExecuteStream:
        """Takes up the stream of a detached job that was begun elsewhere; returns at once, errors come from the stream.

        Args:
            job_id, attach_token: of the stream, or of its `Started`.
            from_index: index of the first token wanted, such as the other stream's `next_index`. From 0 the digests are
                verified; a stream taken up later can only be read.
        """
        request = pb.AttachRequest(job_id=job_id, attach_token=attach_token, from_index=from_index)
        return self._stream(request, timeout_s, correlation_id)

    async def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        job_id: str | None = None,
        timeout_s: float | None = None,
        correlation_id: str | None = None,
        detach: bool = False,
        **params: Unpack[SamplingParams],
    ) -> Generation:
        """Runs a generation to its end. Takes what `execute` takes.

        Raises:
            TokenwireRpcError: the generation was refused, failed or was cancelled.
        """
        async with self.execute(
            prompt,
            messages=messages,
            token_ids=token_ids,
            job_id=job_id,
            timeout_s=timeout_s,
            correlation_id=correlation_id,
            detach=detach,
            **params,
        ) as stream:
            return Generation.from_events([event async for event in stream])

    async def cancel(self, job_id: str, *, timeout_s: float = CANCEL_TIMEOUT_S) -> CancelResult:
        """Stops a job; idempotent. Once it returned, the job's stream carries no further token.

        Raises:
            TokenwireRpcError: the worker could not be asked.
        """
        try:
            answer = await self._stub.Cancel(
                pb.CancelRequest(job_id=job_id), timeout=timeout_s, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        return cancel_from_proto(answer)

    async def health(self, *, timeout_s: float = HEALTH_TIMEOUT_S) -> HealthReport:
        """The worker's state.

        Raises:
            TokenwireRpcError: the worker could not be asked.
        """
        try:
            answer = await self._stub.Health(pb.HealthRequest(), timeout=timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        return health_from_proto(answer)

    async def close(self) -> None:
        """Closes the connection and cancels what still runs on it."""
        if self._cancels:
            await asyncio.wait(self._cancels, timeout=CLOSE_TIMEOUT_S)
        await self._channel.close()

    def _stream(self, request: Request, timeout_s: float | None, correlation_id: str | None) -> AsyncExecuteStream:
        metadata = call_metadata(self._metadata, correlation_id)

        def open_call(request: Request, timeout_s: float | None) -> Any:
            method = self._stub.Execute if isinstance(request, pb.ExecuteRequest) else self._stub.Attach
            return method(request, timeout=timeout_s, metadata=metadata)

        session = Session(request, self._retry, self._timeout_s if timeout_s is None else timeout_s)
        return AsyncExecuteStream(session, open_call, self._cancel_soon)

    def _cancel_soon(self, job_id: str) -> None:
        """Sends a Cancel and does not wait for it: who leaves a stream must not be held up."""
        try:
            task = asyncio.get_running_loop().create_task(self._try_cancel(job_id))
        except RuntimeError:  # the loop is gone, and the job ends by the worker's grace time
            return
        self._cancels.add(task)
        task.add_done_callback(self._cancels.discard)

    async def _try_cancel(self, job_id: str) -> None:
        try:
            await self.cancel(job_id)
        except (TokenwireRpcError, grpc.aio.UsageError):
            pass  # the worker is out of reach or this client closed, and the job ends by its grace time

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
