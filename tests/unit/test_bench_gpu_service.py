"""The GPU service's benchmark on a tiny real model and a CPU: it starts workers, measures them, and ends them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(module: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)


def test_every_figure_is_reported_with_its_runs(tmp_path: Path) -> None:
    model, report = tmp_path / "tiny.gguf", tmp_path / "report.json"
    assert run("make_model", "tiny", "bf16", model).returncode == 0
    flags = ["--runs", "1", "--streams", "4", "--prompts", "16", "--waves", "1", "--max-tokens", "8"]
    done = run("gpu_service", model, "--device", "cpu", *flags, "--processes", "2", "--json", report)
    assert done.returncode == 0, done.stderr
    written = json.loads(report.read_text())
    assert written["command"][:3] == ["python", "-m", "benchmarks.gpu_service"]
    rows = {(row["what"], row["batch"], row["prompt"]): row for row in written["rows"]}
    assert set(rows) == {("start to ready", 1, 0), ("TTFT through gRPC", 1, 16), ("served", 4, 128)}
    for row in rows.values():
        assert (row["model"], row["format"]) == ("tiny", "BF16")
        assert row["value"] > 0
        assert len(row["runs"]) == 1


def test_a_worker_that_does_not_start_is_explained(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    done = run("gpu_service", broken, "--device", "cpu")
    assert done.returncode != 0
    assert "MODEL_LOAD_FAILED" in done.stderr


def test_targets_are_those_of_the_same_model_and_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.report import Row, Target, with_target

    row = Row("m", "BF16", "served", 64, 128, 30_000.0, "tok/s", [30_000.0])
    assert with_target(row, None) == row
    filled = with_target(row, Target(28_000, 43_000, 20_000))
    assert (filled.must, filled.goal, filled.peer, filled.ratio) == (28_000, 43_000, 20_000, 1.5)
    assert with_target(row, Target(1, 2)).ratio is None
