"""`tokenwire generate` and `chat` against a scripted worker: what goes to stdout, what to stderr, and the exit code."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2

from scripted_worker import TIMEOUT_S, Worker, refuse
from tokenwire.v1 import inference_pb2 as pb
from unit.commands import Run, command

TEXT = "Grüße 🌍"


def test_generate_writes_the_text_alone_to_stdout(run: Run, worker: Worker) -> None:
    result = run("generate", "hello", "--target", worker.target)
    assert (result.code, result.out) == (0, TEXT)
    assert "3 tokens, TTFT " in result.err
    assert result.err.endswith("100.0 tokens/s, stopped by end of answer\n")
    assert worker.requests[0].chat.messages[0] == pb.ChatMessage(role="user", content="hello")


def test_generate_sends_what_was_asked_and_nothing_else(run: Run, worker: Worker) -> None:
    run("generate", "hello", "--target", worker.target)
    assert {field.name for field, _ in worker.requests[0].ListFields()} == {"job_id", "chat"}
    options = "--max-tokens 5 --temperature 0 --top-p 0.5 --top-k 0 --min-p 0.1 --repetition-penalty 1.1 --seed 0"
    run(
        "generate", "-", "--raw", *options.split(), "--stop", "a", "--stop", "b", "--target", worker.target, stdin=b"in"
    )
    request = worker.requests[1]
    assert (request.prompt, request.max_tokens, request.temperature) == ("in", 5, 0.0)
    assert (request.top_k, request.seed, list(request.stop)) == (0, 0, ["a", "b"])
    assert request.HasField("temperature")
    assert request.HasField("top_k")
    assert request.HasField("seed")


def test_generate_sends_priority_salt_and_format(run: Run, worker: Worker, tmp_path: Path) -> None:
    options = "--priority -2 --cache-salt t --logprobs 3 --frequency-penalty -1 --presence-penalty 0.5"
    run("generate", "hello", *options.split(), "--regex", "a+", "--target", worker.target)
    request = worker.requests[0]
    assert (request.priority, request.cache_salt, request.logprobs) == (-2, "t", 3)
    assert (request.frequency_penalty, request.presence_penalty) == (-1.0, 0.5)
    assert request.response_format == pb.ResponseFormat(regex="a+")
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    run("generate", "hello", "--json-schema", str(schema), "--target", worker.target)
    assert worker.requests[1].response_format.json_schema == '{"type": "object"}'
    assert run("generate", "x", "--json-schema", str(schema), "--regex", "a", "--target", worker.target).code == 2
    missing = run("generate", "x", "--json-schema", str(tmp_path / "none"), "--target", worker.target)
    assert "cannot be read" in missing.err


def test_generate_detached_goes_on_after_a_break(run: Run, worker: Worker) -> None:
    def script(request: Any, context: grpc.ServicerContext) -> Iterator[pb.ExecuteEvent]:
        yield pb.ExecuteEvent(started=pb.Started(job_id=request.job_id, model="m", seed=1))
        if isinstance(request, pb.ExecuteRequest):
            yield pb.ExecuteEvent(token=pb.Token(t="Grü", i=0, ids=[7]))
            context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        yield pb.ExecuteEvent(token=pb.Token(t="ße", i=request.from_index, ids=[8]))
        yield pb.ExecuteEvent(end=pb.End(tokens_out=2, stop_reason=pb.STOP_REASON_EOS))

    worker.script = script
    result = run("generate", "hello", "--detach", "--target", worker.target)
    assert (result.code, result.out) == (0, "Grüße")
    assert [request.attach_token for request in worker.requests] == [worker.requests[0].attach_token] * 2
    assert run("generate", "hello", "--target", worker.target).code == 1


def test_generate_system_needs_the_template(run: Run, worker: Worker) -> None:
    run("generate", "hello", "--system", "be brief", "--target", worker.target)
    assert [message.role for message in worker.requests[0].chat.messages] == ["system", "user"]
    result = run("generate", "hello", "--raw", "--system", "x", "--target", worker.target)
    assert result.code == 2
    assert "--raw" in result.err


def test_generate_json_prints_every_event_as_a_line(run: Run, worker: Worker) -> None:
    result = run("generate", "hello", "--json", "--target", worker.target)
    events = [json.loads(line) for line in result.out.splitlines()]
    assert [event["event"] for event in events] == ["started", "token", "token", "metrics", "end"]
    assert events[0]["started_at"] == "2030-01-02T03:04:05+00:00"
    assert events[2]["logprobs"][0]["top"][0]["raw"] == "8A=="
    assert result.err == ""


def test_generate_reads_only_utf8(run: Run, worker: Worker) -> None:
    result = run("generate", "-", "--target", worker.target, stdin=b"ok\xff")
    assert result.code == 1
    assert "stdin is not UTF-8 text: invalid start byte at byte 2" in result.err
    assert worker.requests == []


def invalid(request: pb.ExecuteRequest, context: grpc.ServicerContext) -> Iterator[pb.ExecuteEvent]:
    context.send_initial_metadata((("x-correlation-id", "c-1"),))
    violation = error_details_pb2.BadRequest.FieldViolation(field="top_p", description="must be above 0")
    info = error_details_pb2.ErrorInfo(reason="INVALID_REQUEST")
    bad_request = error_details_pb2.BadRequest(field_violations=[violation])
    refuse(context, code_pb2.INVALID_ARGUMENT, "the request is not valid: top_p", info, bad_request)
    yield pb.ExecuteEvent()


def test_a_refusal_names_cause_fields_and_correlation_id(run: Run, worker: Worker) -> None:
    worker.script = invalid
    result = run("generate", "hello", "--top-p", "0", "--target", worker.target)
    assert (result.code, result.out) == (1, "")
    assert result.err == (
        "error: INVALID_REQUEST: the request is not valid: top_p\n  top_p: must be above 0\n  correlation id c-1\n"
    )
    result = run("generate", "hello", "--json", "--target", worker.target)
    event = json.loads(result.out)
    assert (event["event"], event["code"], event["correlation_id"]) == ("error", "INVALID_REQUEST", "c-1")
    assert event["fields"] == [{"field": "top_p", "description": "must be above 0", "reason": ""}]


def test_a_full_queue_says_when_to_try_again(run: Run, worker: Worker) -> None:
    def full(request: pb.ExecuteRequest, context: grpc.ServicerContext) -> Iterator[pb.ExecuteEvent]:
        retry = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=2))
        refuse(context, code_pb2.RESOURCE_EXHAUSTED, "the queue is full", retry)
        yield pb.ExecuteEvent()

    worker.script = full
    assert "hint: try again in 2 s\n" in run("generate", "hello", "--target", worker.target).err


def test_an_absent_worker_is_one_line_with_the_remedy(run: Run) -> None:
    for arguments in (["generate", "hello"], ["health"]):
        result = run(*arguments, "--target", "127.0.0.1:1")
        assert result.code == 1
        assert result.err.startswith("error: UNAVAILABLE: no worker answers at 127.0.0.1:1\nhint: start one with ")
        assert "Traceback" not in result.err


def until_cancelled(request: pb.ExecuteRequest, context: grpc.ServicerContext) -> Iterator[pb.ExecuteEvent]:
    yield pb.ExecuteEvent(started=pb.Started(job_id=request.job_id))
    yield pb.ExecuteEvent(token=pb.Token(t="first", ids=[1]))
    ended = threading.Event()
    if context.add_callback(ended.set):
        ended.wait(TIMEOUT_S)


def test_interrupt_cancels_and_keeps_the_text(worker: Worker) -> None:
    worker.script = until_cancelled
    with command("generate", "hello", "--target", worker.target) as process:
        assert process.stdout is not None
        assert process.stdout.read(5) == b"first"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert out == b""
    assert err.splitlines() == [b"cancelled"]
    assert worker.call_ended.wait(TIMEOUT_S)


def test_a_reader_that_goes_away_ends_the_command_quietly(worker: Worker) -> None:
    def endless(request: pb.ExecuteRequest, context: grpc.ServicerContext) -> Iterator[pb.ExecuteEvent]:
        while context.is_active():
            yield pb.ExecuteEvent(token=pb.Token(t="x" * 100, ids=[1]))

    worker.script = endless
    with command("generate", "hello", "--target", worker.target) as process:
        assert process.stdout is not None
        assert process.stdout.read(5) == b"xxxxx"
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read()
        assert process.wait(TIMEOUT_S) != 0
    assert b"Traceback" not in err
    assert worker.call_ended.wait(TIMEOUT_S)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({"LC_ALL": "C"}, TEXT.encode()), ({"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}, b"Gr??e ?")],
)
def test_any_locale_will_do(worker: Worker, environment: dict[str, str], expected: bytes) -> None:
    with command("generate", "hello", "--target", worker.target, **environment) as process:
        out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out) == (0, expected), err


def test_generated_text_cannot_command_the_terminal(
    run: Run, worker: Worker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def escape(request: pb.ExecuteRequest, context: grpc.ServicerContext) -> Iterator[pb.ExecuteEvent]:
        yield pb.ExecuteEvent(token=pb.Token(t="a\x1b]0;title\x07\tb\n", ids=[1]))
        yield pb.ExecuteEvent(end=pb.End(stop_reason=pb.STOP_REASON_EOS))

    worker.script = escape
    assert run("generate", "x", "--target", worker.target).out == "a\x1b]0;title\x07\tb\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run("generate", "x", "--target", worker.target).out == "a\ufffd]0;title\ufffd\tb\n"


def test_chat_keeps_the_conversation(run: Run, worker: Worker) -> None:
    result = run("chat", "--target", worker.target, stdin=b"/system be brief\none\n\ntwo\n/reset\nthree\n/exit\nfour\n")
    assert (result.code, result.out) == (0, f"{TEXT}\n" * 3)
    turns = [[(turn.role, turn.content) for turn in request.chat.messages] for request in worker.requests]
    system = ("system", "be brief")
    assert turns == [
        [system, ("user", "one")],
        [system, ("user", "one"), ("assistant", TEXT), ("user", "two")],
        [system, ("user", "three")],
    ]


def test_chat_drops_a_question_that_failed(run: Run, worker: Worker) -> None:
    worker.script = invalid
    result = run("chat", "--target", worker.target, "--system", "s", stdin=b"one\ntwo\n/help\n")
    assert result.code == 1
    assert result.err.count("error: INVALID_REQUEST") == 2
    assert "/reset forgets" in result.err
    assert len(worker.requests[1].chat.messages) == 2


def test_chat_interrupt_stops_the_answer_not_the_program(worker: Worker) -> None:
    worker.script = until_cancelled
    with command("chat", "--target", worker.target) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"one\n")
        process.stdin.flush()
        assert process.stdout.read(5) == b"first"
        process.send_signal(signal.SIGINT)
        assert worker.call_ended.wait(TIMEOUT_S)
        assert process.stdout.read(1) == b"\n"
        worker.script = lambda request, context: iter([pb.ExecuteEvent(end=pb.End())])
        process.communicate(b"two\n", timeout=TIMEOUT_S)
    assert process.returncode == 0
    assert [turn.content for turn in worker.requests[1].chat.messages] == ["one", "first", "two"]
