"""The `tokenwire.v1.Inference` service: prepare a job, hand its events through, end it in one way."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

import grpc

from tokenwire.engine import CancelOutcome, JobSpec
from tokenwire.errors import FieldViolation, TokenwireError, invalid_request
from tokenwire.observe.logging import bind_context, get_logger
from tokenwire.observe.metrics import DISCONNECTED, OK
from tokenwire.rpc import convert
from tokenwire.rpc.boundary import Context, is_past_deadline, time_remaining
from tokenwire.rpc.context import fit_context
from tokenwire.rpc.detached import DetachedJobs, DetachLimits
from tokenwire.rpc.layers import Registry
from tokenwire.rpc.observed import JobObserver
from tokenwire.rpc.response_format import compile_format
from tokenwire.rpc.state import SERVICE_NAME, Serving, WorkerState
from tokenwire.rpc.validate import RawRequest, check_attach, check_job_id, check_request
from tokenwire.security.admission import current_admission, revoked_error
from tokenwire.text.errors import TextError
from tokenwire.v1 import inference_pb2 as pb

T = TypeVar("T")

# A seed that we draw survives a client that keeps JSON numbers as JavaScript does.
DRAWN_SEED_BITS = 53


class InferenceServicer:
    """Handlers of the service.

    Args:
        state: the worker's.
        pool: threads for tokenising, which must not hold up the loop.
        inference_timeout_sec: longest a job may take, from its arrival.
        detach_limits: bounds of the jobs that outlive their calls.
    """

    def __init__(
        self, state: WorkerState, pool: Executor, inference_timeout_sec: float, detach_limits: DetachLimits
    ) -> None:
        self._state = state
        self._pool = pool
        self._inference_timeout_sec = inference_timeout_sec
        self._detached = DetachedJobs(detach_limits)
        state.detached = self._detached
        self._observer = JobObserver(state)

    async def execute(self, request: pb.ExecuteRequest, context: Context) -> AsyncGenerator[bytes, None]:
        """Yields serialised events. Raises TokenwireError for a refusal, and after an `error` event."""
        arrived = time.monotonic()
        serving = self._state.require_serving()
        raw = convert.raw_request(request, serving.limits)
        grammar, also = await compile_format(raw.response_format, serving.limits.max_grammar_bytes, serving.grammars)
        check = functools.partial(check_request, raw, serving.limits, serving.text.count_tokens, also)
        await self._in_pool(check) if raw.stop else check()
        # The id is live before the prompt is tokenised, so that Cancel and duplicates meet it from here on.
        admission = current_admission()
        owner = admission.principal.tenant
        with contextlib.ExitStack() as resources:
            stream = resources.enter_context(serving.engine.open(raw.job_id, owner))
            admission.on_revoked(functools.partial(stream.fail, revoked_error))
            bind_context(job_id=raw.job_id, model=serving.facts.name, device=serving.facts.device)
            prompt_ids = await self._encode(serving, raw)
            spec = self._spec(serving, raw, prompt_ids, grammar, arrived, context)
            admission.reserve_tokens(len(prompt_ids) + spec.max_tokens)
            resources.callback(lambda: admission.settle_tokens(len(prompt_ids) + stream.tokens_out))
            serving.engine.start(stream, spec)
            self._observer.started(stream, spec, arrived, context)
            if raw.detach:
                resources.enter_context(admission.keep_open())
                replay = self._detached.keep(
                    stream,
                    resources.pop_all(),
                    token=raw.attach_token or secrets.token_urlsafe(),
                    owner=owner,
                    num_prompt_tokens=len(prompt_ids),
                    arrived=arrived,
                    log_end=self._observer.ended,
                )
                async with contextlib.aclosing(replay.read(0)) as events:
                    async for message in events:
                        yield message
                return
            ending = ""
            try:
                async for message in stream:
                    yield message
                failure = stream.failure
                ending = failure.code if failure is not None else OK
                if failure is not None:
                    if not stream.metrics_sent:
                        yield convert.empty_metrics_event(len(prompt_ids))
                    yield convert.error_event(failure, stream.last_token)
                    raise failure
            finally:
                # No ending means that the call is gone: its deadline passed, or the client left.
                ending = ending or ("INFERENCE_TIMEOUT" if is_past_deadline(context) else DISCONNECTED)
                self._observer.ended(stream, ending, time.monotonic() - arrived)

    async def attach(self, request: pb.AttachRequest, context: Context) -> AsyncGenerator[bytes, None]:
        """Yields the serialised events of a detached job. Raises TokenwireError as `execute` does."""
        check_attach(request.job_id, request.attach_token)
        bind_context(job_id=request.job_id)
        admission = current_admission()
        owner = admission.principal.tenant
        job = self._detached.attach(request.job_id, request.attach_token, owner, request.from_index)
        get_logger().info("attach", from_index=request.from_index)
        async with contextlib.aclosing(job) as events:
            async for message in events:
                if admission.revoked:
                    yield convert.empty_metrics_event(0)
                    yield convert.error_event(revoked_error())
                    raise revoked_error()
                yield message

    async def cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        check_job_id(request.job_id)
        bind_context(job_id=request.job_id)
        if self._state.serving is None:
            return pb.CancelResponse(outcome=pb.CancelResponse.OUTCOME_NOT_FOUND)
        owner = current_admission().principal.tenant
        # Those who read a detached job have its tokens from its record, and not from the engine.
        _, result = await asyncio.gather(
            self._detached.cancel(request.job_id, owner), self._state.serving.engine.cancel(request.job_id, owner)
        )
        log = get_logger().warning if result.outcome is CancelOutcome.NOT_FOUND else get_logger().info
        log("cancel", outcome=result.outcome.value, tokens_out=result.tokens_out)
        return convert.cancel_response(result)

    async def health(self, request: pb.HealthRequest, context: Context) -> pb.HealthResponse:
        return convert.health_response(self._state)

    async def _encode(self, serving: Serving, raw: RawRequest) -> list[int]:
        try:
            if raw.prompt is not None:
                return await self._in_pool(functools.partial(serving.text.encode_prompt, raw.prompt))
            if raw.chat is not None:
                return await self._in_pool(functools.partial(serving.text.encode_chat, raw.chat))
        except TextError as error:
            if error.code != "INVALID_REQUEST":
                raise
            field = "prompt" if raw.prompt is not None else "chat.messages"
            raise invalid_request([FieldViolation(field, error.check.upper(), error.check, str(error))]) from error
        return list(raw.prompt_tokens or ())

    async def _in_pool(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    def _spec(
        self,
        serving: Serving,
        raw: RawRequest,
        prompt_ids: list[int],
        grammar: object | None,
        arrived: float,
        context: Context,
    ) -> JobSpec:
        def default(value: float | None, unset: float) -> float:
            return unset if value is None else value

        input_field = (
            "prompt" if raw.prompt is not None else "chat.messages" if raw.chat is not None else "prompt_tokens"
        )
        return JobSpec(
            job_id=raw.job_id,
            model=serving.facts.name,
            prompt_ids=prompt_ids,
            max_tokens=fit_context(len(prompt_ids), raw.max_tokens, serving.limits, input_field),
            seed=secrets.randbits(DRAWN_SEED_BITS) if raw.seed is None else raw.seed,
            temperature=default(raw.temperature, 1.0),
            top_p=default(raw.top_p, 1.0),
            top_k=raw.top_k or 0,
            min_p=default(raw.min_p, 0.0),
            repetition_penalty=default(raw.repetition_penalty, 1.0),
            frequency_penalty=default(raw.frequency_penalty, 0.0),
            presence_penalty=default(raw.presence_penalty, 0.0),
            logit_bias=raw.logit_bias,
            logprobs=-1 if raw.logprobs is None else raw.logprobs,
            stop=[stop.encode() for stop in raw.stop],
            timeout_ms=self._timeout_ms(raw, arrived, context),
            separate_events=raw.detach,
            cache_salt=current_admission().principal.cache_salt((raw.cache_salt or "").encode()),
            priority=raw.priority or 0,
            grammar=grammar,
        )

    def _timeout_ms(self, raw: RawRequest, arrived: float, context: Context) -> int:
        """What is left of the worker's timeout and of the call's deadline, whichever is less; milliseconds.

        A detached job outlives its call, and so its call's deadline.

        Raises:
            TokenwireError: INFERENCE_TIMEOUT if nothing is left.
        """
        left_s = self._inference_timeout_sec - (time.monotonic() - arrived)
        deadline_s = None if raw.detach else time_remaining(context)
        if deadline_s is not None:
            left_s = min(left_s, deadline_s)
        if left_s <= 0:
            raise TokenwireError("INFERENCE_TIMEOUT")
        return math.ceil(left_s * 1000)


def add_inference(server: Registry, servicer: InferenceServicer) -> None:
    """Registers the service. Execute's events are serialised where they are made, so gRPC must not touch them."""
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Execute": grpc.unary_stream_rpc_method_handler(
            servicer.execute, request_deserializer=pb.ExecuteRequest.FromString, response_serializer=None
        ),
        "Attach": grpc.unary_stream_rpc_method_handler(
            servicer.attach, request_deserializer=pb.AttachRequest.FromString, response_serializer=None
        ),
        "Cancel": grpc.unary_unary_rpc_method_handler(
            servicer.cancel,
            request_deserializer=pb.CancelRequest.FromString,
            response_serializer=pb.CancelResponse.SerializeToString,
        ),
        "Health": grpc.unary_unary_rpc_method_handler(
            servicer.health,
            request_deserializer=pb.HealthRequest.FromString,
            response_serializer=pb.HealthResponse.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
