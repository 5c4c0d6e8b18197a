"""A tokenwire worker as the answering side of a load."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import TYPE_CHECKING

from tokenwire.bench.load import Answer, Arrival
from tokenwire.client import NO_RETRY, AsyncClient, End, Metrics, Started, Token, TokenwireRpcError

if TYPE_CHECKING:
    from typing_extensions import Self

OpenClient = Callable[[float | None, Sequence[tuple[str, int | str]]], AsyncClient]

# A prompt by request number: text, or token ids that are used as they are.
Prompts = Callable[[int], str | Sequence[int]]


class WorkerLoad:
    """Sends prompts over gRPC; its `send` is what a loop of `tokenwire.bench.load` takes.

    Args:
        target: `host:port`, or what opens a client to the worker, given a deadline in seconds and channel options.
        connections: how many carry the streams, in turns.
        prompts: text or token ids by request number.
        max_tokens, temperature: of every request.
        banned_ids: token ids that may not be generated.
        timeout_s: of each request; None waits as long as the worker allows.
    """

    def __init__(
        self,
        target: str | OpenClient,
        *,
        connections: int,
        prompts: Prompts,
        max_tokens: int,
        temperature: float = 0.0,
        banned_ids: Sequence[int] = (),
        timeout_s: float | None = None,
    ) -> None:
        self._target = target
        self._num_connections = connections
        self._prompts = prompts
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._logit_bias = dict.fromkeys(banned_ids, -100.0)
        self._timeout_s = timeout_s
        self._stack = AsyncExitStack()
        self._clients: list[AsyncClient] = []

    async def __aenter__(self) -> Self:
        for _ in range(self._num_connections):
            # Channels to one address share a connection unless each keeps its own.
            options = (("grpc.use_local_subchannel_pool", 1),)
            target = self._target
            client = (
                AsyncClient(target, timeout_s=self._timeout_s, options=options, retry=NO_RETRY)
                if isinstance(target, str)
                else target(self._timeout_s, options)
            )
            self._clients.append(await self._stack.enter_async_context(client))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def send(self, number: int) -> Answer:
        """Sends request `number` and reads its stream to the end."""
        arrivals: list[Arrival] = []
        prompt_tokens = cached_tokens = 0
        queue_ms: float | None = None
        error_code = stop_reason = ""
        prompt = self._prompts(number)
        stream = self._clients[number % len(self._clients)].execute(
            prompt if isinstance(prompt, str) else None,
            token_ids=None if isinstance(prompt, str) else prompt,
            max_tokens=self._max_tokens,
            temperature=self._temperature,
            seed=number,
            logit_bias=self._logit_bias,
        )
        try:
            async with stream:
                async for event in stream:
                    if isinstance(event, Token):
                        if event.ids:
                            arrivals.append(Arrival(time.perf_counter(), len(event.ids)))
                    elif isinstance(event, Started):
                        prompt_tokens, cached_tokens = event.prompt_tokens, event.cached_tokens
                    elif isinstance(event, Metrics):
                        queue_ms = event.queue_ms
                    elif isinstance(event, End):
                        stop_reason = event.stop_reason
        except TokenwireRpcError as error:
            error_code = error.code
        return Answer(tuple(arrivals), error_code, stop_reason, prompt_tokens, cached_tokens, queue_ms)
