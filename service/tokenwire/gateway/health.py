"""Health in three tiers, answered from what the workers last said: no call, no authentication, no limits."""

from __future__ import annotations

import json
from typing import Any

from google.protobuf.message import Message

from tokenwire.gateway.asgi import Receive, Scope, Send, respond
from tokenwire.gateway.context import Gateway
from tokenwire.gateway.worker import Worker
from tokenwire.v1 import inference_pb2 as pb

_STATUSES: dict[int, str] = {
    pb.HealthResponse.STATUS_HEALTHY: "healthy",
    pb.HealthResponse.STATUS_DEGRADED: "degraded",
    pb.HealthResponse.STATUS_UNHEALTHY: "unhealthy",
}
_NO_STORE = {"cache-control": "no-store"}


class Live:
    """200 while the process lives."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, 200, b'{"status":"live"}', extra=_NO_STORE)


class Ready:
    """200 while a worker takes requests: not while it starts, drains, or has too little room left."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        workers = self._gateway.pool.workers
        if any(worker.ready for worker in workers):
            return await respond(send, 200, b'{"status":"ready"}', extra=_NO_STORE)
        reports = [worker.report for worker in workers if worker.report is not None]
        reason = next((report.reason or report.phase for report in reports), "unreachable")
        content = json.dumps({"status": "not ready", "reason": reason}).encode()
        return await respond(send, 503, content, extra={**_NO_STORE, "retry-after": "1"})


class Startup:
    """200 once a worker has loaded its model."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reports = [worker.report for worker in self._gateway.pool.workers if worker.report is not None]
        if any(report.HasField("limits") for report in reports):
            return await respond(send, 200, b'{"status":"started"}', extra=_NO_STORE)
        percent = max((report.load_percent for report in reports), default=0)
        content = json.dumps({"status": "starting", "load_percent": percent}).encode()
        return await respond(send, 503, content, extra=_NO_STORE)


class Health:
    """The report of a worker, the healthiest where there are several, and the state of each."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        workers = self._gateway.pool.workers
        best = min(workers, key=_rank, default=None)
        content = report(best)
        if len(workers) > 1:
            content["workers"] = [{"target": worker.target, **report(worker)} for worker in workers]
        status = 503 if content["status"] == "unhealthy" else 200
        await respond(send, status, json.dumps(content).encode(), extra=_NO_STORE)


def report(worker: Worker | None) -> dict[str, Any]:
    """What a worker last said of itself, with the fields of `HealthResponse`."""
    if worker is None or worker.report is None:
        return {"status": "unhealthy", "phase": "unreachable"}
    content = _fields(worker.report)
    content["status"] = _STATUSES.get(worker.report.status, "unhealthy") if worker.ready else "unhealthy"
    return content


def _fields(message: Message) -> dict[str, Any]:
    """Every field by its name; one that can be absent, and is, is left out."""
    content: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.has_presence and not message.HasField(field.name):
            continue
        value = getattr(message, field.name)
        content[field.name] = _fields(value) if isinstance(value, Message) else value
    return content


def _rank(worker: Worker) -> tuple[bool, bool, int]:
    status = worker.report.status if worker.report is not None else pb.HealthResponse.STATUS_UNHEALTHY
    return (not worker.ready, worker.report is None, status)
