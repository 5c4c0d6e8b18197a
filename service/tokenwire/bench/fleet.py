"""A load that one client process could not carry, shared by several: their requests begin together."""

from __future__ import annotations

import asyncio
import multiprocessing
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier

from tokenwire.bench.load import Record
from tokenwire.bench.plan import Plan, run_share
from tokenwire.bench.worker import OpenClient

START_TIMEOUT_S = 300.0


class FleetError(Exception):
    """A client process failed. `str()` is one line for a person."""


def run_fleet(plan: Plan, vocab_size: int, open_client: OpenClient | None = None) -> list[Record]:
    """Every request's record. Times of all processes are of one clock.

    Args:
        open_client: as `run_share` takes it; it travels to the processes, so it must be picklable.

    Raises:
        FleetError: a process failed.
    """
    context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
    barrier = context.Barrier(plan.processes)
    members = []
    for index in range(plan.processes):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_member, args=(plan, vocab_size, index, barrier, sender, open_client), daemon=True
        )
        process.start()
        sender.close()  # so that the pipe ends with the process
        members.append((process, receiver))
    records: list[Record] = []
    try:
        for _, receiver in members:
            share = receiver.recv()
            if isinstance(share, str):
                raise FleetError(share)
            records += share
    except EOFError as error:
        raise FleetError("a client process ended without a result") from error
    finally:
        for process, receiver in members:
            receiver.close()
            process.terminate()
            process.join()
    return records


def _member(
    plan: Plan, vocab_size: int, index: int, barrier: Barrier, sender: Connection, open_client: OpenClient | None
) -> None:
    try:
        share: list[Record] | str = asyncio.run(
            run_share(plan, vocab_size, index, lambda: barrier.wait(START_TIMEOUT_S), open_client)
        )
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent says it
        barrier.abort()
        share = f"{type(error).__name__}: {error}"
    sender.send(share)
