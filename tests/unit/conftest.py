"""What several files share: a scripted worker, a command in this process, an index, a cache and a model to pull."""

import io
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripted_worker import Worker, running_worker
from tokenwire.cli.main import main
from tokenwire.models.manifest import Model
from unit.commands import Result, Run
from unit.package_index import CONTENT, REFERENCE, SHA256, Handler, Index, Server, make_wheel


@pytest.fixture
def worker() -> Iterator[Worker]:
    with running_worker() as worker:
        yield worker


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    with Server(("127.0.0.1", 0), Handler) as server:
        index = Index(make_wheel(), url=f"http://127.0.0.1:{server.server_port}")
        server.index = index  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("PIP_INDEX_URL", f"{index.url}/simple")
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "http_proxy", "HTTP_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield index
        server.shutdown()
        thread.join()


@pytest.fixture
def cache_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setenv("TOKENWIRE_CACHE", str(path))
    return path


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Model:
    model = Model("tiny", REFERENCE, "tiny.gguf", len(CONTENT), SHA256, "Apache-2.0", "for tests")
    monkeypatch.setattr("tokenwire.models.store.MANIFEST", {"tiny": model})
    return model


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process, with `stdin` as its input."""
    for name in [name for name in os.environ if name.startswith("TOKENWIRE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "argv", ["tokenwire", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return Result(int(caught.value.code or 0), captured.out, captured.err)

    return run
