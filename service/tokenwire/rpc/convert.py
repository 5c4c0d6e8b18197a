"""Between messages and plain values: the only file that knows both the protobuf types and the engine's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from tokenwire.bounds import MAX_LOGIT_BIASES, MAX_STOPS, RULES
from tokenwire.engine import CancelOutcome, CancelResult
from tokenwire.errors import TokenwireError
from tokenwire.rpc.context import check_prompt_length
from tokenwire.rpc.response_format import ResponseFormat
from tokenwire.rpc.state import WorkerState
from tokenwire.rpc.validate import Limits, RawRequest
from tokenwire.v1 import inference_pb2 as pb

_CANCEL_OUTCOMES = {
    CancelOutcome.CANCELLED: pb.CancelResponse.OUTCOME_CANCELLED,
    CancelOutcome.ALREADY_FINISHED: pb.CancelResponse.OUTCOME_ALREADY_FINISHED,
    CancelOutcome.NOT_FOUND: pb.CancelResponse.OUTCOME_NOT_FOUND,
}


def raw_request(request: pb.ExecuteRequest, limits: Limits) -> RawRequest:
    """The plain values of a request. Lists beyond their bound are cut one past it, so that they cost no more.

    Raises:
        TokenwireError: CONTEXT_LENGTH_EXCEEDED for a list of token ids that no context holds.
    """

    def optional(name: str) -> int | float | None:
        return getattr(request, name) if request.HasField(name) else None

    kind = request.WhichOneof("input")
    if kind == "prompt_tokens":
        check_prompt_length(len(request.prompt_tokens.ids), limits)
    numbers = {rule.field: optional(rule.field) for rule in RULES}
    return RawRequest(
        job_id=request.job_id,
        prompt=request.prompt if kind == "prompt" else None,
        prompt_tokens=list(request.prompt_tokens.ids) if kind == "prompt_tokens" else None,
        chat=[(message.role, message.content) for message in request.chat.messages[: limits.max_chat_messages + 1]]
        if kind == "chat"
        else None,
        stop=list(request.stop[: MAX_STOPS + 1]),
        detach=request.detach,
        attach_token=request.attach_token if request.HasField("attach_token") else None,
        logit_bias=dict(itertools.islice(request.logit_bias.items(), MAX_LOGIT_BIASES + 1)),
        cache_salt=request.cache_salt if request.HasField("cache_salt") else None,
        response_format=_format(request.response_format) if request.HasField("response_format") else None,
        **numbers,  # type: ignore[arg-type]
    )


def _format(message: pb.ResponseFormat) -> ResponseFormat:
    kind = message.WhichOneof("format") or ""
    return ResponseFormat(kind, getattr(message, kind) if kind else "")


def error_event(error: TokenwireError, last_token_event: bytes | None = None, from_index: int = 0) -> bytes:
    """A serialised terminal `error` event.

    Args:
        last_token_event: the last `token` event that the call sent, serialised; None if it sent none.
        from_index: the first token that the call wanted.
    """
    event = pb.Error(code=error.code, message=error.message, retriable=error.retriable)
    if error.retriable or error.code == "SLOW_CONSUMER":  # which is the reader's fault, and no request's
        event.resume.from_index = from_index
        if last_token_event is not None:
            token = pb.ExecuteEvent.FromString(last_token_event).token
            event.resume.from_index, event.resume.digest = token.i + len(token.ids), token.digest
    return pb.ExecuteEvent(error=event).SerializeToString()


def empty_metrics_event(num_prompt_tokens: int) -> bytes:
    """A serialised `metrics` event for a job that the engine never summed up."""
    return pb.ExecuteEvent(metrics=pb.Metrics(tokens_in=num_prompt_tokens)).SerializeToString()


def with_attach_token(started_event: bytes, token: str) -> bytes:
    """A serialised `started` event that also carries the job's attach token."""
    event = pb.ExecuteEvent.FromString(started_event)
    event.started.attach_token = token
    return event.SerializeToString()


def token_span(token_event: bytes) -> tuple[int, int]:
    """Index of the first token in a serialised `token` event, and how many it holds."""
    token = pb.ExecuteEvent.FromString(token_event).token
    return token.i, len(token.ids)


def merged_token_event(token_events: Sequence[bytes]) -> bytes:
    """One serialised `token` event in place of several that follow each other."""
    tokens = [pb.ExecuteEvent.FromString(event).token for event in token_events]
    merged = pb.Token(t="".join(token.t for token in tokens), i=tokens[0].i, digest=tokens[-1].digest)
    for token in tokens:
        merged.ids.extend(token.ids)
        merged.logprobs.extend(token.logprobs)
    return pb.ExecuteEvent(token=merged).SerializeToString()


def cancel_response(result: CancelResult) -> pb.CancelResponse:
    return pb.CancelResponse(outcome=_CANCEL_OUTCOMES[result.outcome], tokens_out=result.tokens_out)


def health_response(state: WorkerState) -> pb.HealthResponse:
    """The worker's state, from memory."""
    view = state.view()
    if view.ready:
        status = pb.HealthResponse.STATUS_HEALTHY
    elif view.admitting and view.live:
        status = pb.HealthResponse.STATUS_DEGRADED
    else:
        status = pb.HealthResponse.STATUS_UNHEALTHY
    response = pb.HealthResponse(
        status=status,
        reason=view.reason,
        model=state.model,
        device=state.device,
        uptime_seconds=state.uptime_seconds,
        phase=state.phase.value,
        load_percent=state.load_percent,
    )
    serving = state.serving
    if serving is None:
        return response
    facts, limits, stats = serving.facts, serving.limits, serving.engine.stats()
    response.model = facts.name
    response.device = facts.device
    response.quant_kind = facts.quant_kind
    response.tokenizer_kind = facts.tokenizer_kind
    response.vocab_size = facts.vocab_size
    response.context_length = facts.context_length
    response.resident = state.resident
    response.sm = facts.sm
    response.cuda_runtime_version = facts.cuda_runtime_version
    response.device_name = facts.device_name
    response.memory.weight_bytes = stats.weight_bytes
    response.memory.kv_bytes = stats.kv_bytes
    response.memory.workspace_bytes = stats.workspace_bytes
    if facts.device != "cpu":
        response.vram_bytes_used = stats.weight_bytes + stats.kv_bytes + stats.workspace_bytes
    if state.residency_age_seconds is not None:
        response.residency_age_seconds = state.residency_age_seconds
    response.pool_utilization = stats.used_blocks / stats.total_blocks if stats.total_blocks else 0.0
    response.limits.max_prompt_chars = limits.max_prompt_chars
    response.limits.max_chat_messages = limits.max_chat_messages
    response.limits.max_tokens_in = limits.max_tokens_in
    response.limits.max_tokens_out = limits.max_tokens_out
    response.limits.max_token_bytes = limits.max_token_bytes
    response.limits.max_grammar_bytes = limits.max_grammar_bytes
    response.active = stats.active_jobs
    response.queued = stats.queued_jobs
    return response
