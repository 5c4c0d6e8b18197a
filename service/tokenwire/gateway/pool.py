"""The workers behind a gateway: which there are, and whose turn it is."""

from __future__ import annotations

import asyncio
import socket
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress

import grpc

from tokenwire.errors import TokenwireError
from tokenwire.gateway.worker import Metadata, Worker
from tokenwire.observe.logging import get_logger
from tokenwire.v1 import inference_pb2 as pb

RESOLVE_SECONDS = 5.0
# How long streams may go on at a worker whose name is gone; a worker that drains ends them sooner.
LEAVE_SECONDS = 600.0
DNS_PREFIX = "dns:"
REMEMBERED_JOBS = 10_000

_CANCEL_RANK = {
    pb.CancelResponse.OUTCOME_CANCELLED: 2,
    pb.CancelResponse.OUTCOME_ALREADY_FINISHED: 1,
}


class WorkerPool:
    """Hands out workers in turn, those first that say they are ready.

    Args:
        targets: gRPC addresses; `dns:HOST:PORT` stands for every address of that host, looked up again and again.
        credentials: for TLS; None is plain text.
    """

    def __init__(self, targets: Iterable[str], credentials: grpc.ChannelCredentials | None = None) -> None:
        self._targets = tuple(targets)
        self._credentials = credentials
        self._workers: OrderedDict[str, Worker] = OrderedDict()
        self._turn = 0
        self._jobs: OrderedDict[str, Worker] = OrderedDict()
        self._resolving: asyncio.Future[None] | None = None
        self._leaving: set[asyncio.Future[None]] = set()

    @property
    def workers(self) -> Sequence[Worker]:
        return tuple(self._workers.values())

    async def start(self) -> None:
        for target in self._targets:
            if not target.startswith(DNS_PREFIX):
                self._add(target)
        if any(target.startswith(DNS_PREFIX) for target in self._targets):
            await self._resolve()
            self._resolving = asyncio.ensure_future(self._keep_resolving())

    async def close(self) -> None:
        if self._resolving is not None:
            self._resolving.cancel()
            with suppress(asyncio.CancelledError):
                await self._resolving
        for leaving in self._leaving:
            leaving.cancel()
        await asyncio.gather(*self._leaving, return_exceptions=True)
        await asyncio.gather(*(worker.close() for worker in self._workers.values()))

    def candidates(self, model: str | None = None) -> list[Worker]:
        """Workers for one request, the one whose turn it is first. Those that are not ready come last, and only
        where no other is: their own refusal says best why.

        Raises:
            TokenwireError: NOT_FOUND for a model that no reachable worker serves; UNAVAILABLE without any worker.
        """
        workers = self.workers
        if not workers:
            raise TokenwireError("UNAVAILABLE", "no worker is known")
        if model is not None:
            known = [worker for worker in workers if worker.report is not None]
            if known and all(worker.model != model for worker in known):
                raise TokenwireError("NOT_FOUND", "no worker serves this model")
            workers = [worker for worker in workers if worker.report is None or worker.model == model]
        self._turn += 1
        first = self._turn % len(workers)
        turned = [*workers[first:], *workers[:first]]
        return [worker for worker in turned if worker.ready] or turned

    def remember(self, job_id: str, worker: Worker) -> None:
        """Notes where a job runs, for Cancel and Attach."""
        self._jobs[job_id] = worker
        while len(self._jobs) > REMEMBERED_JOBS:
            self._jobs.popitem(last=False)

    def holders(self, job_id: str) -> tuple[list[Worker], list[Worker]]:
        """Where a job may be: where this gateway last started one of this id, else all; and the other workers.

        Ids belong to their tenants, so that the job known here may be another's of the same id: the others must be
        asked too, unless the first have the job.
        """
        known = self._jobs.get(job_id)
        likely = [known] if known is not None and known in self.workers else list(self.workers)
        return likely, [worker for worker in self.workers if worker not in likely]

    async def cancel(self, job_id: str, metadata: Metadata) -> pb.CancelResponse:
        """Cancels a job where it runs; a job that another gateway started is looked for on every worker.

        Raises:
            TokenwireError: no worker could be asked, or each refused.
        """
        answers: list[pb.CancelResponse | BaseException] = []
        for workers in self.holders(job_id):
            asked = (worker.cancel(job_id, metadata) for worker in workers)
            answers += await asyncio.gather(*asked, return_exceptions=True)
            responses = [answer for answer in answers if isinstance(answer, pb.CancelResponse)]
            if any(response.outcome == pb.CancelResponse.OUTCOME_CANCELLED for response in responses):
                break  # a job that had finished here may still run elsewhere, under the same id
        if responses:
            return max(responses, key=lambda response: _CANCEL_RANK.get(response.outcome, 0))
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        raise TokenwireError("UNAVAILABLE", "no worker is known")

    def _add(self, target: str) -> None:
        if target not in self._workers:
            self._workers[target] = Worker(target, self._credentials)

    async def _keep_resolving(self) -> None:
        while True:
            await asyncio.sleep(RESOLVE_SECONDS)
            await self._resolve()

    async def _resolve(self) -> None:
        """Adds the workers that names now stand for and lets go of those that are gone. A failed look-up changes
        nothing."""
        wanted: set[str] = set()
        for target in self._targets:
            if not target.startswith(DNS_PREFIX):
                wanted.add(target)
                continue
            host, _, port = target.removeprefix(DNS_PREFIX).lstrip("/").rpartition(":")
            try:
                found = await asyncio.get_running_loop().getaddrinfo(
                    host.strip("[]"), int(port), type=socket.SOCK_STREAM
                )
            except (OSError, ValueError) as error:
                get_logger().warning("worker_lookup_failed", target=target, message=str(error))
                return
            wanted.update(_shown(str(address[0]), port) for *_, address in found)
        for target in sorted(wanted):
            self._add(target)
        for target in [target for target in self._workers if target not in wanted]:
            gone = asyncio.ensure_future(self._workers.pop(target).close(LEAVE_SECONDS))
            self._leaving.add(gone)
            gone.add_done_callback(self._leaving.discard)


def _shown(host: str, port: str) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
