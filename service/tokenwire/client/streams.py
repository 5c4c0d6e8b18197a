"""What a caller iterates over: a session driven by blocking calls, and the same by asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from tokenwire.client.errors import TokenwireRpcError, error_from_call, error_from_rpc
from tokenwire.client.events import Event
from tokenwire.client.session import Request, Session

if TYPE_CHECKING:
    from typing_extensions import Self

# Opens a call for a request with this deadline (seconds; None for none).
OpenCall = Callable[[Request, float | None], Any]


class ExecuteStream(Iterator[Event]):
    """The events of one job: `Started`, `Token`…, `Metrics`, `End`.

    Iterating raises TokenwireRpcError where the job fails. A detached job's stream that breaks is taken up again by
    itself, and no event is lost, repeated or changed. Leaving the stream early, by `close`, by the end of a `with`
    block or by dropping it, cancels the job; `leave` does not.
    """

    def __init__(self, session: Session, open_call: OpenCall, cancel_job: Callable[[str], None]) -> None:
        self._session = session
        self._open_call = open_call
        self._cancel_job = cancel_job
        self._closed = threading.Event()
        self._error: TokenwireRpcError | None = None
        self._call = open_call(session.request, session.remaining_s())

    @property
    def job_id(self) -> str:
        """The id that `Client.cancel` and `Client.attach` take."""
        return self._session.job_id

    @property
    def attach_token(self) -> str:
        """The secret that `Client.attach` takes; empty if the job is not detached."""
        return self._session.attach_token

    @property
    def next_index(self) -> int:
        """Index of the token after the last one handed out: where another client would go on."""
        return self._session.next_index

    @property
    def num_calls(self) -> int:
        """Calls it took so far: more than 1 after a retry or a break."""
        return self._session.num_calls

    def __next__(self) -> Event:
        session = self._session
        while True:
            if session.ready:
                return session.ready.popleft()
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if session.over or self._closed.is_set():
                raise StopIteration
            self._read()

    def _read(self) -> None:
        session = self._session
        try:
            try:
                session.receive(next(self._call))
                return
            except StopIteration:
                wait_s = session.ended()
            except grpc.RpcError as error:
                if self._closed.is_set():
                    return
                wait_s = session.failed(error_from_call(error, session.error_event))
        except TokenwireRpcError as error:
            self._error = error
            self._end(session.is_forsaken)
            return
        if session.over:
            self._closed.set()
        elif not self._closed.wait(wait_s):
            self._call = self._open_call(session.request, session.remaining_s())

    def leave(self) -> None:
        """Stops reading. A detached job runs on for the worker's grace time, for `Client.attach` to take up."""
        self._end(cancel_job=False)

    def close(self) -> None:
        """Cancels the job if it still runs. Idempotent; iterating a closed stream ends at once."""
        self._end(cancel_job=self._session.detached and not self._session.completed)

    def _end(self, cancel_job: bool) -> None:
        if not self._closed.is_set():
            self._closed.set()
            self._call.cancel()
            if cancel_job:  # a call that ends takes only an attached job with it
                self._cancel_job(self._session.job_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_call"):  # else there was no opening it
            self.close()


class AsyncExecuteStream(AsyncIterator[Event]):
    """The events of one job: `Started`, `Token`…, `Metrics`, `End`.

    Iterating raises TokenwireRpcError where the job fails. A detached job's stream that breaks is taken up again by
    itself, and no event is lost, repeated or changed. Leaving the stream early, by `close`, by the end of an
    `async with` block, by dropping it or by cancelling the task that reads it, cancels the job; `leave` does not.
    """

    def __init__(self, session: Session, open_call: OpenCall, cancel_job: Callable[[str], None]) -> None:
        self._session = session
        self._open_call = open_call
        self._cancel_job = cancel_job
        self._closed = asyncio.Event()
        self._error: TokenwireRpcError | None = None
        self._call = open_call(session.request, session.remaining_s())

    @property
    def job_id(self) -> str:
        """The id that `AsyncClient.cancel` and `AsyncClient.attach` take."""
        return self._session.job_id

    @property
    def attach_token(self) -> str:
        """The secret that `AsyncClient.attach` takes; empty if the job is not detached."""
        return self._session.attach_token

    @property
    def next_index(self) -> int:
        """Index of the token after the last one handed out: where another client would go on."""
        return self._session.next_index

    @property
    def num_calls(self) -> int:
        """Calls it took so far: more than 1 after a retry or a break."""
        return self._session.num_calls

    async def __anext__(self) -> Event:
        session = self._session
        while True:
            if session.ready:
                return session.ready.popleft()
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if session.over or self._closed.is_set():
                raise StopAsyncIteration
            try:
                await self._read()
            except asyncio.CancelledError:
                self.close()
                raise

    async def _read(self) -> None:
        session = self._session
        try:
            try:
                message = await self._call.read()
                if message is not grpc.aio.EOF:
                    session.receive(message)
                    return
                wait_s = session.ended()
            except grpc.aio.AioRpcError as error:
                wait_s = session.failed(error_from_rpc(error, session.error_event))
        except TokenwireRpcError as error:
            self._error = error
            self._end(session.is_forsaken)
            return
        if session.over:
            self._closed.set()
            return
        try:
            await asyncio.wait_for(self._closed.wait(), wait_s)
        except asyncio.TimeoutError:
            self._call = self._open_call(session.request, session.remaining_s())

    def leave(self) -> None:
        """Stops reading. A detached job runs on for the worker's grace time, for `AsyncClient.attach` to take up."""
        self._end(cancel_job=False)

    def close(self) -> None:
        """Cancels the job if it still runs. Idempotent; iterating a closed stream ends at once."""
        self._end(cancel_job=self._session.detached and not self._session.completed)

    def _end(self, cancel_job: bool) -> None:
        if not self._closed.is_set():
            self._closed.set()
            self._call.cancel()
            if cancel_job:  # a call that ends takes only an attached job with it
                self._cancel_job(self._session.job_id)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_call"):  # else there was no opening it
            self.close()
