"""`tokenwire bench` against a scripted worker: what it sends, what it prints, and its exit code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2

from scripted_worker import Worker, refuse
from tokenwire.bench.fleet import FleetError, run_fleet
from tokenwire.bench.plan import Plan
from tokenwire.v1 import inference_pb2 as pb
from unit.commands import Result, Run


@pytest.fixture
def run(run: Run, worker: Worker) -> Run:
    """Runs `tokenwire bench` on the worker."""

    def run_bench(*arguments: str) -> Result:
        return run("bench", "--target", worker.target, *arguments)

    return run_bench


def test_every_figure_is_in_the_json(run: Run, worker: Worker, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    code, out, _ = run("--requests", "6", "--concurrency", "3", "--warmup", "2", "--seed", "1", "--json", str(file))
    assert code == 0
    assert "time to first token, ms" in out
    assert "6 answers, 18 tokens in " in out
    report = json.loads(file.read_text())
    assert report["plan"]["seed"] == 1
    assert report["worker"]["quant_kind"] == "Q4_1"
    summary = report["summary"]
    # The script sends three tokens in two events.
    assert (summary["completed"], summary["tokens_out"], summary["tokens_per_event"]) == (6, 18, 1.5)
    assert (summary["ttft_ms"]["count"], summary["itl_ms"]["count"], summary["event_gap_ms"]["count"]) == (6, 6, 6)
    assert summary["stop_reasons"] == {"eos": 6}
    assert [row["tokens_out"] for row in report["requests"]] == [3] * 6


def test_requests_are_distinct_greedy_and_of_the_length_asked_for(run: Run, worker: Worker) -> None:
    arguments = ["--requests", "5", "--warmup", "3", "--prompt-tokens", "17", "--max-tokens", "9", "--ban-token", "2"]
    assert run(*arguments, "--seed", "4")[0] == 0
    assert len(worker.requests) == 8
    prompts = {tuple(request.prompt_tokens.ids) for request in worker.requests}
    assert len(prompts) == 8
    assert {len(prompt) for prompt in prompts} == {17}
    assert {(request.max_tokens, request.temperature) for request in worker.requests} == {(9, 0.0)}
    assert {tuple(request.logit_bias.items()) for request in worker.requests} == {((2, -100.0),)}
    assert len({request.job_id for request in worker.requests}) == 8
    # The same seed sends the same prompts again; without one nothing repeats, so that no prefix is cached.
    run(*arguments, "--seed", "4")
    assert {tuple(request.prompt_tokens.ids) for request in worker.requests[8:]} == prompts
    run(*arguments)
    assert not {tuple(request.prompt_tokens.ids) for request in worker.requests[16:]} & prompts


def test_an_open_loop_over_several_connections(run: Run, worker: Worker) -> None:
    code, out, _ = run("--requests", "8", "--rate", "400", "--warmup", "0", "--connections", "3")
    assert code == 0
    assert "8 requests, 400 requests/s, 64 tokens in" in out
    assert len(worker.requests) == 8


def test_refusals_are_counted_by_code_and_leave_the_figures_alone(run: Run, worker: Worker) -> None:
    happy = worker.script

    def every_second(request: pb.ExecuteRequest, context: grpc.ServicerContext) -> Iterator[pb.ExecuteEvent]:
        if request.seed % 2:
            info = error_details_pb2.ErrorInfo(reason="OVERLOADED", domain="tokenwire")
            refuse(context, code_pb2.RESOURCE_EXHAUSTED, "the queue is full", info)
        yield from happy(request, context)

    worker.script = every_second
    code, out, err = run("--requests", "6", "--warmup", "0", "--json", "-")
    assert code == 0
    summary = json.loads(out)["summary"]
    assert (summary["completed"], summary["errors"], summary["tokens_out"]) == (3, {"OVERLOADED": 3}, 9)
    _, out, err = run("--requests", "6", "--warmup", "0")
    assert "failed requests, in no figure above: OVERLOADED 3" in err
    assert "answers that ended before 128 tokens: 3" in err


def test_a_run_without_an_answer_fails(run: Run, worker: Worker) -> None:
    def never(request: pb.ExecuteRequest, context: grpc.ServicerContext) -> Iterator[pb.ExecuteEvent]:
        refuse(context, code_pb2.UNAVAILABLE, "draining")
        yield pb.ExecuteEvent()

    worker.script = never
    code, _, err = run("--requests", "2", "--warmup", "0")
    assert code == 1
    assert "error: no request completed: UNAVAILABLE (2)" in err


def test_a_prompt_beyond_the_context_is_refused_before_anything_is_sent(run: Run, worker: Worker) -> None:
    code, _, err = run("--prompt-tokens", "8100", "--max-tokens", "93")
    assert code == 2
    assert "8100 prompt tokens + 93 are beyond the worker's context (8192 tokens)" in err
    assert worker.requests == []


def test_a_worker_that_is_not_there_is_one_line(run: Run) -> None:
    code, out, err = run("--target", "127.0.0.1:1")
    assert (code, out) == (1, "")
    assert err.startswith("error: UNAVAILABLE: no worker answers at 127.0.0.1:1\n")


def test_a_worker_that_is_loading_is_named(run: Run, worker: Worker) -> None:
    worker.health = pb.HealthResponse(status=pb.HealthResponse.STATUS_UNHEALTHY, phase="loading")
    code, _, err = run()
    assert code == 1
    assert "the worker is loading" in err


def test_the_plot_is_written_and_a_bad_path_is_one_line(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "bench.svg"
    assert run("--requests", "2", "--plot", str(file))[0] == 0
    assert file.read_text().startswith("<svg ")
    code, _, err = run("--requests", "2", "--plot", str(tmp_path / "no" / "bench.svg"))
    assert code == 1
    assert "cannot be written" in err


def test_wrong_usage_exits_with_2(run: Run) -> None:
    for arguments in (["--requests", "0"], ["--rate", "0"], ["--concurrency", "0"], ["--max-tokens", "0"]):
        assert run(*arguments)[0] == 2


def test_several_processes_share_the_requests(run: Run, worker: Worker, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    arguments = ("--requests", "7", "--concurrency", "4", "--warmup", "2", "--seed", "1", "--processes", "2")
    code, out, _ = run(*arguments, "--json", str(file))
    assert code == 0
    assert "7 answers, 21 tokens in " in out
    report = json.loads(file.read_text())
    assert report["plan"]["processes"] == 2
    assert len(report["requests"]) == 7
    sent = [tuple(request.prompt_tokens.ids) for request in worker.requests]
    assert len(set(sent)) == 9  # every prompt is sent once, the warm-up's too


def test_a_process_that_fails_is_named(worker: Worker) -> None:
    plan = Plan(worker.target, 2, 2, None, 5, 4, 0.0, 0, 1, (), 1, None, processes=2)
    with pytest.raises(FleetError, match="ValueError"):
        run_fleet(plan, vocab_size=0)
