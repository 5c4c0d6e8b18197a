"""A worker process with a real engine on a tiny model, and its log."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from service.worker_process import Process

SCRIPT = Path(__file__).parents[1] / "service" / "fake_worker.py"


@asynccontextmanager
async def running(model: Path, scenario: str = "real", **flags: object) -> AsyncIterator[Process]:
    """A worker process with a real engine, its log read from stderr."""
    settings = {"model": str(model), "num_threads": 1, "max_tokens_out": 15000, "kv_cache_size_mb": 64, **flags}
    child = await asyncio.create_subprocess_exec(
        sys.executable, SCRIPT, scenario, json.dumps(settings), stderr=asyncio.subprocess.PIPE
    )
    process = Process(child)
    try:
        await process.connect()
        yield process
    finally:
        if process.channel is not None:
            await process.channel.close()
        if child.returncode is None:
            child.kill()
            await child.wait()
