"""`/v1/models`, `/v1/completions`, `/v1/chat/completions`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from tokenwire.errors import TokenwireError
from tokenwire.gateway.asgi import Receive, Scope, Send, correlation_id, respond
from tokenwire.gateway.body import read_json_object
from tokenwire.gateway.context import Gateway
from tokenwire.gateway.execute import refuse_resume
from tokenwire.gateway.fields import rename_failure
from tokenwire.gateway.generation import Departure, Generation, start_generation
from tokenwire.gateway.openai.request import CompletionRequest
from tokenwire.gateway.openai.response import Chunks, whole
from tokenwire.gateway.sse import stream_events
from tokenwire.v1 import inference_pb2 as pb

Parse = Callable[[Mapping[str, Any], Gateway], CompletionRequest]


class Completions:
    """One of the two kinds of completion, by how its body is parsed."""

    def __init__(self, gateway: Gateway, parse: Parse) -> None:
        self._gateway = gateway
        self._parse = parse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway = self._gateway
        refuse_resume(scope)
        body = await read_json_object(scope, receive, gateway.settings.http_max_body_bytes)
        request = self._parse(body, gateway)
        async with Departure(receive) as departure:
            try:
                generation = await start_generation(
                    gateway.pool,
                    request.message,
                    gateway.metadata(scope),
                    departure,
                    model=request.model,
                    wait_s=gateway.heartbeat_s if request.stream else None,
                )
                if not request.stream:
                    answer = whole(request, await _collect(generation))
            except TokenwireError as error:
                raise rename_failure(error, request.renamed) from error
            if request.stream:
                await stream_events(send, generation, Chunks(request, correlation_id(scope)), gateway.heartbeat_s)
            else:
                await respond(send, 200, json.dumps(answer).encode())


class Models:
    """The models that the workers serve."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._created = int(time.time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        known = {worker.model: self._shape(worker.report) for worker in self._gateway.pool.workers if worker.report}
        wanted = scope["path_params"].get("model")
        if wanted is None:
            content: dict[str, Any] = {"object": "list", "data": list(known.values())}
        elif wanted in known:
            content = known[wanted]
        else:
            raise TokenwireError("NOT_FOUND", "no worker serves this model")
        await respond(send, 200, json.dumps(content).encode())

    def _shape(self, report: pb.HealthResponse) -> dict[str, Any]:
        return {
            "id": report.model,
            "object": "model",
            "created": self._created,
            "owned_by": "tokenwire",
            "context_length": report.context_length,
        }


async def _collect(generation: Generation) -> list[pb.ExecuteEvent]:
    try:
        events = []
        while (event := await generation.read()) is not None:
            events.append(event)
        return events
    finally:
        generation.close()
