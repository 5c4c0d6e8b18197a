"""Traces of jobs, with OpenTelemetry (the extra `otel`): four spans each, one the parent of the next.

    Execute           the call, from its arrival to the end of its stream
      batch_submit    in the engine's queue
        inference     from admission to the last token
          cache_lookup  in the prefix cache, while the step that admitted the job was planned

Spans are made when a job ends, from times that the engine took anyway, so a job that runs costs nothing. Without an
exporter nothing of OpenTelemetry is imported.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenwire._version import __version__
from tokenwire.config import Settings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.trace import Span

# Names of OpenTelemetry's conventions for generative AI, which are still in development: all of them stand here.
OPERATION = "gen_ai.operation.name"
PROVIDER = "gen_ai.provider.name"
REQUEST_MODEL = "gen_ai.request.model"
RESPONSE_MODEL = "gen_ai.response.model"
RESPONSE_ID = "gen_ai.response.id"
REQUEST_MAX_TOKENS = "gen_ai.request.max_tokens"
REQUEST_TEMPERATURE = "gen_ai.request.temperature"
REQUEST_TOP_P = "gen_ai.request.top_p"
REQUEST_TOP_K = "gen_ai.request.top_k"
REQUEST_SEED = "gen_ai.request.seed"
FINISH_REASONS = "gen_ai.response.finish_reasons"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
CACHED_TOKENS = "gen_ai.usage.cache_read.input_tokens"
TIME_TO_FIRST = "gen_ai.response.time_to_first_chunk"
ERROR_TYPE = "error.type"

CARRIER_KEYS = ("traceparent", "tracestate")
EXPORT_TIMEOUT_S = 5


class TracingError(Exception):
    """Tracing was asked for and cannot be had. `str()` is one line for a person."""


@dataclass(frozen=True, slots=True)
class JobTimes:
    """When what happened to a job, milliseconds; `wall_ms` from the call's arrival, the others from submission on."""

    wall_ms: float
    submitted_ms: float
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    first_token_ms: float = 0.0
    cache_lookup_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class JobTrace:
    """A job that ended.

    Attributes:
        carrier: the caller's trace context, as W3C's headers.
        attributes: of the request; never text of a prompt or an answer.
        admitted: whether it reached the batch.
        tokens: prompt, cached and generated.
    """

    carrier: Mapping[str, str]
    attributes: Mapping[str, str | int | float]
    times: JobTimes
    code: str
    stop_reason: str
    admitted: bool
    tokens: tuple[int, int, int]


class JobTracer:
    """Makes and exports the spans of jobs. Use `build_tracer`."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("tokenwire", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def job_ended(self, job: JobTrace) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        now = time.time_ns()

        def at(from_arrival_ms: float) -> int:
            return now - int((job.times.wall_ms - from_arrival_ms) * 1e6)

        request = self._tracer.start_span(
            "Execute",
            context=self._propagator.extract(dict(job.carrier)),
            kind=SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.service": "tokenwire.v1.Inference", "rpc.method": "Execute"},
            start_time=at(0),
        )
        if request.is_recording():
            request.set_attributes(dict(job.attributes))
            failed = job.code != "OK"
            if failed:
                request.set_attribute(ERROR_TYPE, job.code)
                request.set_status(Status(StatusCode.ERROR, job.code))
            times = job.times
            # The lookup ends where the engine says that the job was admitted.
            queued_until = times.submitted_ms + max(0.0, times.queue_ms - times.cache_lookup_ms)
            submit = self._child(request, "batch_submit", at(times.submitted_ms))
            if job.admitted:
                inference = self._tracer.start_span(
                    "inference",
                    context=set_span_in_context(submit),
                    attributes=_usage(job),
                    start_time=at(queued_until),
                )
                lookup = self._child(inference, "cache_lookup", at(queued_until))
                lookup.set_attributes({"tokenwire.cache.tier": "device", "tokenwire.cache.hit_tokens": job.tokens[1]})
                lookup.end(at(times.submitted_ms + times.queue_ms))
                if failed:
                    inference.set_status(Status(StatusCode.ERROR, job.code))
                ran_ms = times.queue_ms + times.prefill_ms + times.decode_ms
                inference.end(at(min(times.wall_ms, times.submitted_ms + ran_ms)))
            submit.end(at(queued_until))
        request.end(now)

    def close(self) -> None:
        """Exports what waits; gives up after `EXPORT_TIMEOUT_S`."""
        self._provider.force_flush(EXPORT_TIMEOUT_S * 1000)
        self._provider.shutdown()

    def _child(self, parent: Span, name: str, start_ns: int) -> Span:
        from opentelemetry.trace import set_span_in_context

        return self._tracer.start_span(name, context=set_span_in_context(parent), start_time=start_ns)


def carrier_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> dict[str, str]:
    """The caller's trace context, of a call's metadata."""
    return {key: value for key, value in metadata or () if key in CARRIER_KEYS and isinstance(value, str)}


def build_tracer(settings: Settings) -> JobTracer | None:
    """What the settings ask for; None for no tracing, which imports nothing.

    Raises:
        TracingError: OpenTelemetry is not installed.
    """
    if settings.trace_exporter == "off":
        return None
    try:
        resources = importlib.import_module("opentelemetry.sdk.resources")
        sdk = importlib.import_module("opentelemetry.sdk.trace")
        export = importlib.import_module("opentelemetry.sdk.trace.export")
        sampling = importlib.import_module("opentelemetry.sdk.trace.sampling")
        if settings.trace_exporter == "otlp":
            otlp = importlib.import_module("opentelemetry.exporter.otlp.proto.grpc.trace_exporter")
            exporter = otlp.OTLPSpanExporter(endpoint=settings.otlp_endpoint or None, timeout=EXPORT_TIMEOUT_S)
        else:
            exporter = export.ConsoleSpanExporter(out=sys.stdout, formatter=_one_line)
    except ImportError as error:
        raise TracingError(
            f"trace_exporter: {settings.trace_exporter} needs OpenTelemetry ({error}): pip install 'tokenwire[otel]'"
        ) from error
    provider = sdk.TracerProvider(
        resource=resources.Resource.create(
            {"service.name": "tokenwire", "service.version": __version__, "service.instance.id": settings.worker_id}
        ),
        sampler=sampling.ParentBased(sampling.TraceIdRatioBased(settings.trace_sample_ratio)),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(export.BatchSpanProcessor(exporter))
    return JobTracer(provider)


def _usage(job: JobTrace) -> dict[str, str | int | float | tuple[str, ...]]:
    prompt, cached, generated = job.tokens
    attributes: dict[str, str | int | float | tuple[str, ...]] = {
        OPERATION: "text_completion",
        PROVIDER: "tokenwire",
        INPUT_TOKENS: prompt,
        CACHED_TOKENS: cached,
        OUTPUT_TOKENS: generated,
        TIME_TO_FIRST: job.times.first_token_ms / 1000,
    }
    if job.stop_reason:
        attributes[FINISH_REASONS] = (job.stop_reason,)
    return attributes


def _one_line(span: ReadableSpan) -> str:
    return f"{span.to_json(indent=None)}\n"
