"""A worker process with a real engine on a tiny model, and its log."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from service.worker_process import Process, worker_processes


@asynccontextmanager
async def running(model: Path, scenario: str = "real", **flags: object) -> AsyncIterator[Process]:
    """A worker process with a real engine, ready and connected to."""
    settings = {"model": str(model), "num_threads": 1, "max_tokens_out": 15000, "kv_cache_size_mb": 64, **flags}
    async with worker_processes() as start:
        process = await start(scenario, **settings)
        await process.connect()
        yield process
