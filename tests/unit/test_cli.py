"""The other commands, and what all share: what goes to stdout, what to stderr, and the exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripted_worker import Worker
from tokenwire import __version__
from tokenwire.bounds import RULES
from tokenwire.v1 import inference_pb2 as pb
from unit.commands import Run


def test_health_shows_the_state_and_says_it_with_the_exit_code(run: Run, worker: Worker) -> None:
    result = run("health", "--target", worker.target)
    assert result.code == 0
    assert dict(line.split(None, 1) for line in result.out.splitlines())["status"] == "healthy"
    assert "49,152 entries" in result.out
    report = json.loads(run("health", "--json", "--target", worker.target).out)
    assert (report["status"], report["model"], report["context_length"]) == ("healthy", "m", 8192)
    status = pb.HealthResponse.STATUS_UNHEALTHY
    worker.health = pb.HealthResponse(status=status, phase="loading", load_percent=25, reason="engine_stalled")
    result = run("health", "--target", worker.target)
    assert result.code == 1
    assert "unhealthy: engine stalled" in result.out
    assert "loading (25 %)" in result.out


def test_serve_lists_every_problem_at_once(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "worker.toml"
    file.write_text("colour = 'red'\n")
    result = run("serve", "--port", "70000", "--kv-cache-size-mb", "10GB", "--config", str(file))
    assert result.code == 78
    assert result.err.startswith("error: the configuration has 3 problems\n")
    for name in ("port (from --port)", "kv_cache_size_mb (from --kv-cache-size-mb)", f"colour (from {file})"):
        assert name in result.err


def test_serve_takes_its_device_before_it_imports_the_service(tmp_path: Path) -> None:
    """The driver needs as long as the imports. A file that is wrong is told all the same."""
    script = """
import sys
from tokenwire import _native
_native.open_cuda_device = lambda number: print(number, *sorted({"grpc", "rich", "structlog"} & set(sys.modules)))
from tokenwire.cli.main import main
sys.argv[1:] = ["serve", "--model", "m", "--device", "cuda:3", "--api-keys-file", sys.argv[1]]
main()
"""
    command = [sys.executable, "-c", script, str(tmp_path / "missing.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 78
    assert done.stdout == "3\n"
    assert "missing.json" in done.stderr


def test_the_service_does_not_import_rich_and_leaves_it_to_others() -> None:
    script = "import sys, tokenwire.server; assert 'rich' not in sys.modules; import rich.console"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_serve_without_a_model_says_how_to_name_one(run: Run) -> None:
    result = run("serve")
    assert result.code == 78
    assert "tokenwire serve --model smollm2" in result.err


def test_info_shows_values_with_their_origins(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "worker.toml"
    file.write_text("port = 1234\ndrain_seconds = 5\n")
    monkeypatch.setenv("TOKENWIRE_PORT", "4321")
    settings = json.loads(run("info", "--json", "--config", str(file)).out)["settings"]
    assert settings["port"] == {"value": 4321, "origin": "TOKENWIRE_PORT"}
    assert settings["drain_seconds"] == {"value": 5.0, "origin": str(file)}
    assert settings["host"] == {"value": "127.0.0.1", "origin": "default"}
    limits = json.loads(run("info", "--json", "--config", str(file)).out)["limits"]
    assert limits["temperature"] == "0 to 2; unset: 1; 0 is greedy"
    assert {rule.field for rule in RULES} <= limits.keys()
    text = run("info").out
    assert "Limits of a request" in text
    assert "TOKENWIRE_PORT" in text
    assert "CUDA" in text
    monkeypatch.setenv("TOKENWIRE_PORT", "no")
    assert run("info").code == 78


def test_info_of_a_file_that_is_no_model_is_one_line(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(b"GGUF but not really")
    result = run("info", "--model", str(file))
    assert result.code == 1
    assert result.err.startswith("error: ")
    assert "Traceback" not in result.err


def test_version_names_the_build(run: Run) -> None:
    result = run("--version")
    assert result.code == 0
    assert result.out.startswith(f"tokenwire {__version__} (")
    assert "CUDA: " in result.out


def test_wrong_usage_exits_with_2(run: Run) -> None:
    for arguments in (["generate"], ["no-such-command"], ["generate", "x", "--seed", "-1"]):
        assert run(*arguments).code == 2


def test_help_of_every_command_names_its_flags(run: Run) -> None:
    commands = {"serve": "--inference-timeout-sec", "generate": "--max-tokens", "chat": "--system", "pull": "NAME"}
    for name, expected in {**commands, "health": "--json", "info": "--model"}.items():
        result = run(name, "--help")
        assert result.code == 0
        assert expected in result.out
    assert "78" in run("--help").out


def test_a_command_that_is_spelt_nearly_right_is_suggested(run: Run) -> None:
    result = run("genrate")
    assert result.code == 2
    assert "No such command 'genrate'" in result.err
    assert "generate" in result.err
