"""The blocking client. One `Client` may be used from many threads; a stream belongs to the thread that reads it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc

from tokenwire.client.auth import key_metadata
from tokenwire.client.errors import TokenwireRpcError, error_from_status
from tokenwire.client.events import (
    CancelResult,
    End,
    Event,
    Generation,
    HealthReport,
    cancel_from_proto,
    event_from_proto,
    health_from_proto,
)
from tokenwire.client.request import (
    CANCEL_TIMEOUT_S,
    DEFAULT_TARGET,
    HEALTH_TIMEOUT_S,
    Message,
    SamplingParams,
    build_request,
    call_metadata,
    channel_options,
)
from tokenwire.v1 import inference_pb2 as pb
from tokenwire.v1 import inference_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class ExecuteStream(Iterator[Event]):
    """The events of one job: `Started`, `Token`…, `Metrics`, `End`.

    Iterating raises TokenwireRpcError where the job fails. Leaving the stream early, by `close`, by the end of a `with`
    block or by dropping it, cancels the job.
    """

    def __init__(self, call: Any, job_id: str) -> None:
        self._call = call
        self._job_id = job_id
        self._closed = False
        self._ended = False

    @property
    def job_id(self) -> str:
        """The id that `Client.cancel` takes."""
        return self._job_id

    def __next__(self) -> Event:
        error_event: pb.Error | None = None
        while not self._closed:
            try:
                event = event_from_proto(next(self._call))
            except StopIteration:
                self._closed = True
                if error_event is not None:
                    raise error_from_status(grpc.StatusCode.UNKNOWN, None, None, None, error_event) from None
                if not self._ended:
                    raise TokenwireRpcError("INTERNAL", "the stream ended without a terminal event") from None
            except grpc.RpcError as error:
                closed, self._closed = self._closed, True
                if not closed:
                    raise _error_from_call(error, error_event) from error
            else:
                if isinstance(event, pb.Error):
                    error_event = event  # the status with its details follows
                elif event is not None:
                    self._ended = self._ended or isinstance(event, End)
                    return event
        raise StopIteration

    def close(self) -> None:
        """Cancels the job if it still runs. Idempotent; iterating a closed stream ends at once."""
        self._closed = True
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self._call.cancel()


class Client:
    """A connection to one worker.

    Args:
        target: `host:port`, or any gRPC target.
        credentials: for TLS, as `channel_credentials` makes them; None is plain text.
        api_key: shown with every call; a worker reads it in clear unless there is TLS.
        metadata: sent with every call.
        timeout_s: deadline of a generation in seconds; None waits as long as the worker allows.
        options: gRPC channel options beside, or instead of, the client's own.
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
    ) -> None:
        self._metadata = (*key_metadata(api_key), *metadata)
        self._timeout_s = timeout_s
        self._channel = (
            grpc.insecure_channel(target, channel_options(target, options))
            if credentials is None
            else grpc.secure_channel(target, credentials, channel_options(target, options))
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
        **params: Unpack[SamplingParams],
    ) -> ExecuteStream:
        """Starts a generation; returns at once, errors come from the stream.

        Args:
            prompt, messages, token_ids: exactly one: text, a conversation, or token ids used as they are.
            job_id: unique among the worker's live jobs; a UUID if absent.
            timeout_s: this call's deadline, in place of the client's.
            correlation_id: names the call in the worker's log; the worker draws one if absent.
            params: see SamplingParams; what is absent keeps the worker's default.
        """
        request = build_request(prompt, messages, token_ids, job_id, params)
        call = self._stub.Execute(
            request,
            timeout=self._timeout_s if timeout_s is None else timeout_s,
            metadata=call_metadata(self._metadata, correlation_id),
        )
        return ExecuteStream(call, request.job_id)

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        job_id: str | None = None,
        timeout_s: float | None = None,
        correlation_id: str | None = None,
        **params: Unpack[SamplingParams],
    ) -> Generation:
        """Runs a generation to its end. Takes what `execute` takes.

        Raises:
            TokenwireRpcError: the generation was refused, failed or was cancelled.
        """
        with self.execute(
            prompt,
            messages=messages,
            token_ids=token_ids,
            job_id=job_id,
            timeout_s=timeout_s,
            correlation_id=correlation_id,
            **params,
        ) as stream:
            return Generation.from_events(list(stream))

    def cancel(self, job_id: str, *, timeout_s: float = CANCEL_TIMEOUT_S) -> CancelResult:
        """Stops a job; idempotent. Once it returned, the job's stream carries no further token.

        Raises:
            TokenwireRpcError: the worker could not be asked.
        """
        try:
            answer = self._stub.Cancel(pb.CancelRequest(job_id=job_id), timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise _error_from_call(error) from error
        return cancel_from_proto(answer)

    def health(self, *, timeout_s: float = HEALTH_TIMEOUT_S) -> HealthReport:
        """The worker's state.

        Raises:
            TokenwireRpcError: the worker could not be asked.
        """
        try:
            answer = self._stub.Health(pb.HealthRequest(), timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise _error_from_call(error) from error
        return health_from_proto(answer)

    def close(self) -> None:
        """Closes the connection and cancels what still runs on it."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _error_from_call(call: Any, event: pb.Error | None = None) -> TokenwireRpcError:
    # grpcio's blocking exceptions are the call itself: they carry the status and the metadata.
    return error_from_status(call.code(), call.details(), call.initial_metadata(), call.trailing_metadata(), event)
