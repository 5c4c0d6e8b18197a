"""One worker with the small real model, which every example talks to."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from e2e.helpers_server import running_worker
from tokenwire import models

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TIMEOUT_S = 100

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def target() -> Iterator[str]:
    with running_worker(models.resolve("smollm2", fetch=True)) as address:
        yield address


@pytest.fixture
def run(target: str) -> Run:
    """Runs an example as a person would, with the worker's address in the environment."""

    def run(
        *command: str, stdin: str = "", cwd: Path = EXAMPLES, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "TOKENWIRE_TARGET": target, "PYTHONWARNINGS": "error", **environment}
        return subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=cwd, env=env, check=False
        )

    return run
