"""`tokenwire bench`: load on a running worker, and what its streams looked like."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tokenwire import __version__
from tokenwire.bench.chart import render_svg
from tokenwire.bench.fleet import FleetError, run_fleet
from tokenwire.bench.load import Record, num_connections
from tokenwire.bench.plan import Plan, run_share
from tokenwire.bench.summary import Distribution, Summary
from tokenwire.cli import options
from tokenwire.cli.connection import Connection, with_connection
from tokenwire.cli.output import CliError, ExitCode, note, print_rpc_error, printable
from tokenwire.client import HealthReport, TokenwireRpcError


def bench(
    connection: Connection,
    requests: Annotated[int, typer.Option(help="Requests to send and measure.", min=1)] = 64,
    concurrency: Annotated[
        int, typer.Option(help="Closed loop: clients, each sends when its last answer ended.", min=1, max=10_000)
    ] = 8,
    rate: Annotated[
        float | None,
        typer.Option(help="Open loop instead: requests a second, at random (Poisson) times.", min=0.001, max=100_000),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Random tokens in each prompt.", min=1, max=2**22)] = 64,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of each answer.", min=1, max=2**31)] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0, max=2)] = 0.0,
    warm_up: Annotated[int, typer.Option("--warmup", help="Requests sent before, not measured.", min=0)] = 4,
    connections: Annotated[
        int, typer.Option(help="Connections that share the streams; 0: one for 50 streams.", min=0, max=1000)
    ] = 0,
    processes: Annotated[
        int, typer.Option(help="Client processes that share the load, for more streams than one can read.", min=1)
    ] = 1,
    ban_token: Annotated[
        list[int] | None,
        typer.Option(help="Never generate this id; ban the end of answer for answers of equal length.", min=0),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Of prompts and arrival times; a repeated seed meets its prompts in the prefix cache.",
            min=0,
            max=2**64 - 1,
            show_default="drawn",
        ),
    ] = None,
    timeout: options.Timeout = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write all that was measured here; `-` is stdout, without the table."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the percentiles here, as SVG.")] = None,
) -> None:
    """Measure a running worker: time to first token, inter-token latency, tokens a second.

    Exit code 1 if no request completed; requests that the worker refuses are counted by their code.
    """
    # An open loop has no bound on its streams; several connections keep most of them clear of a connection's limit.
    streams = concurrency if rate is None else min(requests, 400)
    plan = Plan(
        target=connection.target,
        requests=requests,
        concurrency=concurrency,
        rate=rate,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        temperature=temperature,
        warm_up=warm_up,
        connections=connections or num_connections(streams),
        ban_tokens=tuple(ban_token or ()),
        seed=secrets.randbits(32) if seed is None else seed,
        timeout_s=timeout,
        processes=min(processes, requests, concurrency),
    )
    try:
        worker = asyncio.run(_ask(plan, connection))
        if plan.processes > 1:
            records = run_fleet(plan, worker.vocab_size, connection.async_client)
        else:
            records = asyncio.run(run_share(plan, worker.vocab_size, 0, lambda: None, connection.async_client))
    except FleetError as error:
        raise CliError(str(error)) from error
    except TokenwireRpcError as error:
        print_rpc_error(error, connection.target)
        raise typer.Exit(ExitCode.FAILED) from None
    summary = Summary.of(records)
    if json_file is not None:
        _write(json_file, json.dumps(_report(plan, worker, summary, records), indent=1) + "\n")
    if plot is not None:
        _write(plot, render_svg(summary, _title(worker), _load_line(plan)))
    if json_file != Path("-"):
        _print_summary(plan, worker, summary)
    if not summary.completed:
        codes = ", ".join(f"{code} ({count})" for code, count in summary.errors.items())
        raise CliError(f"no request completed: {codes}")


app = options.command_app(with_connection(bench))


async def _ask(plan: Plan, connection: Connection) -> HealthReport:
    """The worker's facts.

    Raises:
        CliError: it is not ready, or its context is too short for the plan.
    """
    async with connection.async_client() as client:
        worker = await client.health()
    if worker.phase != "ready":
        raise CliError(f"the worker is {worker.phase}", "try again once `tokenwire health` shows it ready")
    if plan.prompt_tokens + plan.max_tokens > worker.context_length:
        wanted = f"{plan.prompt_tokens} prompt tokens + {plan.max_tokens}"
        raise CliError(
            f"{wanted} are beyond the worker's context ({worker.context_length} tokens)",
            "lower --prompt-tokens or --max-tokens",
            ExitCode.USAGE,
        )
    return worker


def _title(worker: HealthReport) -> str:
    return f"{worker.model} {worker.quant_kind} on {worker.device}"


def _load_line(plan: Plan) -> str:
    how = f"{plan.concurrency} clients" if plan.rate is None else f"{plan.rate:g} requests/s"
    return f"{plan.requests} requests, {how}, {plan.prompt_tokens} tokens in, at most {plan.max_tokens} out"


def _print_summary(plan: Plan, worker: HealthReport, summary: Summary) -> None:
    console = Console(file=sys.stdout)
    console.print(printable(f"{_title(worker)}: {_load_line(plan)}"), markup=False, highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in ("p50", "p95", "p99", "mean", "max"):
        table.add_column(name, justify="right")
    rows = [
        ("time to first token, ms", summary.ttft_ms),
        ("inter-token latency, ms", summary.itl_ms),
        ("gap between events, ms", summary.event_gap_ms),
        ("whole answer, ms", summary.latency_ms),
        ("queued in the worker, ms", summary.queue_ms),
    ]
    for label, distribution in rows:
        table.add_row(label, *_cells(distribution))
    console.print(table)
    console.print(
        f"{summary.tokens_per_second:.1f} tokens/s, {summary.requests_per_second:.2f} requests/s: "
        f"{summary.completed} answers, {summary.tokens_out} tokens in {summary.duration_s:.2f} s",
        highlight=False,
        soft_wrap=True,
    )
    for line in _remarks(plan, summary):
        note(line)


def _cells(distribution: Distribution | None) -> list[str]:
    if distribution is None:
        return ["-"] * 5
    values = (distribution.p50, distribution.p95, distribution.p99, distribution.mean, distribution.most)
    return ["-" if value is None else f"{value:.2f}" for value in values]


def _remarks(plan: Plan, summary: Summary) -> list[str]:
    """What a reader of the table must know to trust it."""
    lines = []
    if summary.errors:
        codes = ", ".join(f"{code} {count}" for code, count in sorted(summary.errors.items()))
        lines.append(f"failed requests, in no figure above: {codes}")
    early = summary.completed - summary.stop_reasons.get("max_tokens", 0)
    if early:
        lines.append(f"answers that ended before {plan.max_tokens} tokens: {early}; see --ban-token")
    if summary.cached_tokens:
        lines.append(f"{summary.cached_tokens} of {summary.prompt_tokens} prompt tokens came from the prefix cache")
    if summary.tokens_per_event is not None and summary.tokens_per_event > 1.05:
        lines.append(f"{summary.tokens_per_event:.2f} tokens an event: this reader lagged behind the worker")
    if summary.send_lag_ms is not None and summary.send_lag_ms.most > 10:
        lines.append(f"requests were sent up to {summary.send_lag_ms.most:.0f} ms late: this machine is short of time")
    return lines


def _report(plan: Plan, worker: HealthReport, summary: Summary, records: list[Record]) -> Mapping[str, object]:
    begin_s = min(record.due_s for record in records)
    return {
        "tokenwire": __version__,
        "plan": dataclasses.asdict(plan),
        "worker": dataclasses.asdict(worker),
        "summary": dataclasses.asdict(summary),
        "requests": [_request_row(record, begin_s) for record in records],
    }


def _request_row(record: Record, begin_s: float) -> Mapping[str, object]:
    answer = record.answer
    return {
        "due_s": record.due_s - begin_s,
        "sent_s": record.sent_s - begin_s,
        "ended_s": record.ended_s - begin_s,
        "first_token_s": answer.arrivals[0].at_s - begin_s if answer.arrivals else None,
        "last_token_s": answer.arrivals[-1].at_s - begin_s if answer.arrivals else None,
        "tokens_out": answer.num_tokens,
        "events": len(answer.arrivals),
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
        "queue_ms": answer.queue_ms,
        "stop_reason": answer.stop_reason,
        "error": answer.error_code,
    }


def _write(path: Path, text: str) -> None:
    if path == Path("-"):
        sys.stdout.write(text)
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CliError(f"{path} cannot be written: {error.strerror}") from error
