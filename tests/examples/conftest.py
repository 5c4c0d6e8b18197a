"""One worker with the small real model, which every example talks to."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from e2e.helpers_server import free_port, running_worker
from tokenwire import models

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TIMEOUT_S = 100

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def http_port() -> int:
    return free_port()


@pytest.fixture(scope="session")
def target(http_port: int) -> Iterator[str]:
    with running_worker(models.resolve("smollm2", fetch=True), "--http-port", str(http_port)) as address:
        yield address


@pytest.fixture(scope="session")
def javascript(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Node examples with their locked dependencies, in a copy."""
    copy = tmp_path_factory.mktemp("examples") / "examples" / "javascript"
    shutil.copytree(EXAMPLES / "javascript", copy, ignore=shutil.ignore_patterns("node_modules"))
    shutil.copytree(EXAMPLES.parent / "protos", copy.parents[1] / "protos")
    command = ("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
    installed = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=300, check=False)
    assert installed.returncode == 0, installed.stderr
    return copy


@pytest.fixture
def run(target: str, http_port: int) -> Run:
    """Runs an example as a person would, with the worker's address in the environment."""

    def run(
        *command: str, stdin: str = "", cwd: Path = EXAMPLES, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
        env = {
            **os.environ,
            "PATH": path,
            "PYTHONWARNINGS": "error",
            "TOKENWIRE_TARGET": target,
            "TOKENWIRE_URL": f"http://127.0.0.1:{http_port}",
            **environment,
        }
        return subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=cwd, env=env, check=False
        )

    return run
