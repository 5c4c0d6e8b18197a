"""`tokenwire health`: the worker's state."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from tokenwire.cli import options
from tokenwire.cli.connection import Connection, with_connection
from tokenwire.cli.output import ExitCode, print_facts, print_rpc_error
from tokenwire.client import HealthReport, TokenwireRpcError
from tokenwire.client.request import HEALTH_TIMEOUT_S


def health(
    connection: Connection,
    timeout: Annotated[float, typer.Option(help="Give up after this many seconds.", min=0)] = HEALTH_TIMEOUT_S,
    as_json: options.Json = False,
) -> None:
    """Show the worker's state. Exit code 0 if it is healthy, 1 if not or if it cannot be reached."""
    with connection.client() as client:
        try:
            report = client.health(timeout_s=timeout)
        except TokenwireRpcError as error:
            print_rpc_error(error, connection.target)
            raise typer.Exit(ExitCode.FAILED) from None
    if as_json:
        print(json.dumps(dataclasses.asdict(report), ensure_ascii=False))
    else:
        print_facts(_rows(report))
    raise typer.Exit(ExitCode.OK if report.status == "healthy" else ExitCode.FAILED)


app = options.command_app(with_connection(health))


def _rows(report: HealthReport) -> list[tuple[str, str]]:
    rows = [
        ("status", f"{report.status}: {report.reason.replace('_', ' ')}" if report.reason else report.status),
        ("phase", report.phase if report.load_percent == 100 else f"{report.phase} ({report.load_percent} %)"),
        ("model", report.model),
        ("weights", f"{report.quant_kind}, {'resident' if report.resident else 'not resident'}"),
        ("tokenizer", f"{report.tokenizer_kind}, {report.vocab_size:,} entries"),
        ("context", f"{report.context_length:,} tokens"),
        ("device", f"{report.device} ({report.device_name})" if report.device_name else report.device),
        ("jobs", f"{report.active} active, {report.queued} queued"),
        ("KV pool", f"{report.pool_utilization:.1%} in use"),
        ("uptime", f"{report.uptime_seconds:,} s"),
    ]
    rows.insert(7, ("memory", _memory(report)))
    if report.sm:
        rows.insert(7, ("compute capability", f"{report.sm // 10}.{report.sm % 10}"))
        rows.insert(8, ("CUDA runtime", report.cuda_runtime_version))
        rows.insert(9, ("VRAM in use", f"{report.vram_bytes_used / 2**20:,.0f} MiB"))
    return rows


def _memory(report: HealthReport) -> str:
    parts = {"weights": report.weight_bytes, "KV pool": report.kv_bytes, "workspace": report.workspace_bytes}
    return ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in parts.items())
