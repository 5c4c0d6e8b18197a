"""Tests that need an NVIDIA GPU. Asked for (`-m gpu`), they fail without one; they are never skipped."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from service.worker_process import worker_processes
from tokenwire import _native


@pytest.fixture(autouse=True, scope="session")
def _gpu() -> None:
    assert _native.cuda_status() == "available"


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Any]]:
    """Starts worker processes: `await start(scenario of fake_worker.py, **flags)`."""
    async with worker_processes() as start_process:
        yield start_process
