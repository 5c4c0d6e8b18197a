"""A generation that runs on a worker for one HTTP request, and its end: the last event, a failure, or the client's
leaving."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from tokenwire.errors import TokenwireError
from tokenwire.gateway.asgi import Receive
from tokenwire.gateway.body import ClientGoneError
from tokenwire.gateway.pool import WorkerPool
from tokenwire.gateway.worker import Metadata, Worker, error_from_call
from tokenwire.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from typing_extensions import Self


class Departure:
    """Waits for the client to close the connection, once its request has been read in full.

    Leaving the block ends the wait.
    """

    def __init__(self, receive: Receive) -> None:
        self.happened = False
        self._callbacks: list[Callable[[], object]] = []
        self._task = asyncio.ensure_future(self._wait(receive))

    def then(self, callback: Callable[[], object]) -> None:
        """Runs `callback` when the client leaves, at once if it has left."""
        if self.happened:
            callback()
        else:
            self._callbacks.append(callback)

    async def _wait(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.happened = True
        for callback in self._callbacks:
            callback()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])


class Generation:
    """The events of one job. `close` cancels it where it still runs."""

    def __init__(self, call: Any, departure: Departure, first: asyncio.Future[Any]) -> None:
        self._call = call
        self._departure = departure
        self._first: asyncio.Future[Any] | None = first
        self._error_event: pb.Error | None = None

    async def read(self) -> pb.ExecuteEvent | None:
        """The next event, never `error`; None after the last.

        Raises:
            TokenwireError: the job was refused, failed or was cancelled.
            ClientGoneError: the client left, and the job with it.
        """
        while True:
            try:
                if self._first is not None:
                    first, self._first = self._first, None
                    event = await first
                else:
                    event = await self._call.read()
            except grpc.aio.AioRpcError as error:
                raise error_from_call(error, self._error_event) from error
            except asyncio.CancelledError:
                if self._departure.happened:
                    raise ClientGoneError from None
                raise
            if event is grpc.aio.EOF:
                return None
            if event.HasField("error"):
                self._error_event = event.error  # its status follows
            else:
                return event  # type: ignore[no-any-return]

    def close(self) -> None:
        if self._first is not None:
            self._first.cancel()
        self._call.cancel()


async def start_generation(
    pool: WorkerPool,
    request: pb.ExecuteRequest,
    metadata: Metadata,
    departure: Departure,
    *,
    model: str | None = None,
    wait_s: float | None = None,
) -> Generation:
    """Starts a job on the worker whose turn it is. A worker that is not serving passes it on to the next.

    Args:
        wait_s: how long to wait for the job's admission, seconds; None for as long as it takes. A job that waits in the
            queue for longer is returned as it is, and may still be refused.

    Raises:
        TokenwireError: the job was refused, with the refusal of the last worker that was asked.
        ClientGoneError: the client left.
    """
    workers = pool.candidates(model)
    return await _first_to_accept(
        pool,
        workers,
        "UNAVAILABLE",
        lambda worker: worker.execute(request, metadata),
        request.job_id,
        departure,
        wait_s,
    )


async def attach_generation(
    pool: WorkerPool,
    request: pb.AttachRequest,
    metadata: Metadata,
    departure: Departure,
    *,
    wait_s: float | None = None,
) -> Generation:
    """Takes up a detached job's stream on the worker that has it. Raises what `start_generation` raises."""
    likely, others = pool.holders(request.job_id)
    workers = [*likely, *others]
    return await _first_to_accept(
        pool, workers, "NOT_FOUND", lambda worker: worker.attach(request, metadata), request.job_id, departure, wait_s
    )


async def _first_to_accept(
    pool: WorkerPool,
    workers: Sequence[Worker],
    passed_on: str,
    begin: Callable[[Worker], Any],
    job_id: str,
    departure: Departure,
    wait_s: float | None,
) -> Generation:
    """Asks the workers in turn; one that answers with the code `passed_on`, before anything began, leaves it to the
    next."""
    failure = TokenwireError("UNAVAILABLE", "no worker is known")
    for worker in workers:
        call = begin(worker)
        departure.then(call.cancel)
        first = asyncio.ensure_future(call.read())
        generation = Generation(call, departure, first)
        try:
            await asyncio.wait([first], timeout=wait_s)
            if first.done() and not first.cancelled() and (error := first.exception()) is not None:
                if not isinstance(error, grpc.aio.AioRpcError):
                    raise error
                failure = error_from_call(error)
                if failure.code in ("UNAVAILABLE", passed_on):
                    continue
                raise failure
            if departure.happened:
                raise ClientGoneError
        except BaseException:
            generation.close()
            raise
        pool.remember(job_id, worker)
        return generation
    raise failure
