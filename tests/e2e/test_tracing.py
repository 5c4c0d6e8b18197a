"""A job's trace, as a collector receives it: four spans, one the parent of the next, in the caller's trace (A-5)."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

from e2e.helpers_server import running_worker
from tokenwire.config_sources import load_settings
from tokenwire.observe import tracing
from tokenwire.v1 import inference_pb2 as pb
from tokenwire.v1 import inference_pb2_grpc
from unit.gguf_builder import tiny_llama

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = "00f067aa0ba902b7"
SAMPLED, NOT_SAMPLED = f"00-{TRACE_ID}-{CALLER}-01", f"00-{TRACE_ID}-{CALLER}-00"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP collector that hands on what it receives."""

    def __init__(self) -> None:
        self.spans: queue.Queue[Any] = queue.Queue()
        self.resource: dict[str, str] = {}

    def Export(self, request: Any, context: Any) -> Any:
        for part in request.resource_spans:
            self.resource = {item.key: item.value.string_value for item in part.resource.attributes}
            for scope in part.scope_spans:
                for span in scope.spans:
                    self.spans.put(span)
        return otlp.ExportTraceServiceResponse()

    def next_trace(self, count: int) -> dict[str, Any]:
        """The next spans by name."""
        return {span.name: span for span in (self.spans.get(timeout=30) for _ in range(count))}


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[Collector, int]]:
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield collector, port
    server.stop(None).wait()


@pytest.fixture(scope="module")
def stub(collector: tuple[Collector, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf", dtype="Q4_1", context=512).path
    flags = ("--trace-exporter", "otlp", "--otlp-endpoint", f"http://127.0.0.1:{collector[1]}", "--worker-id", "w-1")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")  # milliseconds that spans wait for company
        with running_worker(path, *flags) as target, grpc.insecure_channel(target) as channel:
            yield inference_pb2_grpc.InferenceStub(channel)


def request(job_id: str, **fields: Any) -> pb.ExecuteRequest:
    ids = pb.TokenIds(ids=[3 + i % 200 for i in range(40)])
    return pb.ExecuteRequest(job_id=job_id, prompt_tokens=ids, max_tokens=4, seed=2**64 - 1, **fields)


def attributes(span: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}


def test_a_job_has_four_spans_in_its_callers_trace(collector: tuple[Collector, int], stub: Any) -> None:
    metrics = None
    for job_id in ("first", "second"):  # the second finds its prompt in the cache
        for event in stub.Execute(request(job_id), metadata=(("traceparent", SAMPLED), ("tracestate", "a=b"))):
            metrics = event.metrics if event.HasField("metrics") else metrics
        spans = collector[0].next_trace(4)
    call, submit, inference, lookup = (spans[name] for name in ("Execute", "batch_submit", "inference", "cache_lookup"))
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE_ID}
    assert call.parent_span_id.hex() == CALLER
    assert call.trace_state == "a=b"
    assert submit.parent_span_id == call.span_id
    assert inference.parent_span_id == submit.span_id
    assert lookup.parent_span_id == inference.span_id
    assert call.kind == trace_pb2.Span.SPAN_KIND_SERVER
    for span in (submit, inference, lookup):
        assert call.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= call.end_time_unix_nano
    assert submit.end_time_unix_nano == inference.start_time_unix_nano == lookup.start_time_unix_nano

    said = attributes(call)
    assert (said["gen_ai.response.id"], said["gen_ai.request.max_tokens"]) == ("second", 4)
    assert said["gen_ai.request.seed"] == str(2**64 - 1)
    used = attributes(inference)
    assert (used["gen_ai.usage.input_tokens"], used["gen_ai.usage.output_tokens"]) == (40, metrics.tokens_out)
    assert used["gen_ai.usage.cache_read.input_tokens"] == metrics.cached_tokens == 32
    assert used["gen_ai.response.time_to_first_chunk"] == pytest.approx(metrics.first_token_ms / 1000)
    assert attributes(lookup)["tokenwire.cache.hit_tokens"] == 32
    assert collector[0].resource["service.name"] == "tokenwire"
    assert collector[0].resource["service.instance.id"] == "w-1"


def test_a_caller_that_does_not_sample_gets_no_trace_and_a_failed_job_is_marked(
    collector: tuple[Collector, int], stub: Any
) -> None:
    list(stub.Execute(request("unsampled"), metadata=(("traceparent", NOT_SAMPLED),)))
    call = stub.Execute(
        pb.ExecuteRequest(job_id="cut", prompt="x", max_tokens=400, logit_bias={0: -100, 2: -100}), timeout=30
    )
    next(call)
    stub.Cancel(pb.CancelRequest(job_id="cut"))
    with pytest.raises(grpc.RpcError):
        list(call)
    spans = collector[0].next_trace(4)  # those of the job that had no caller's trace, and none before them
    assert spans["Execute"].trace_id.hex() != TRACE_ID
    assert attributes(spans["Execute"])["gen_ai.response.id"] == "cut"
    assert attributes(spans["Execute"])["error.type"] == "CANCELLED"
    assert spans["Execute"].status.code == trace_pb2.Status.STATUS_CODE_ERROR


@pytest.mark.parametrize("traceparent", ["", "x" * 5000, "00-zz-zz-01", f"ff-{TRACE_ID}-{CALLER}-01"])
def test_a_hostile_trace_context_is_as_good_as_none(
    collector: tuple[Collector, int], stub: Any, traceparent: str
) -> None:
    list(stub.Execute(request("hostile"), metadata=(("traceparent", traceparent),)))
    spans = collector[0].next_trace(4)
    assert spans["Execute"].parent_span_id == b""


def test_the_console_shows_a_span_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracer = tracing.build_tracer(load_settings({"trace_exporter": "console"}, environ={}))
    assert tracer is not None
    times = tracing.JobTimes(wall_ms=20, submitted_ms=1, queue_ms=2, prefill_ms=3, decode_ms=4, cache_lookup_ms=0.1)
    tracer.job_ended(tracing.JobTrace({}, {"a": "b"}, times, "OK", "eos", True, (5, 0, 6)))
    tracer.close()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(line["name"] for line in lines) == ["Execute", "batch_submit", "cache_lookup", "inference"]


def test_without_an_exporter_nothing_of_it_is_imported() -> None:
    program = (
        "import sys, tokenwire.server; from tokenwire.config_sources import load_settings;"
        "assert tokenwire.server.build_tracer(load_settings(environ={})) is None;"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_asked_for_and_not_installed_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(tracing.importlib, "import_module", absent)
    with pytest.raises(tracing.TracingError, match=r"pip install 'tokenwire\[otel\]'"):
        tracing.build_tracer(load_settings({"trace_exporter": "otlp"}, environ={}))
