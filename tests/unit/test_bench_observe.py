"""The benchmark of watching, on a tiny model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from unit.gguf_builder import tiny_llama

ROOT = Path(__file__).resolve().parents[2]


SIZES = "--requests 8 --concurrency 4 --max-tokens 16 --runs 1 --vocabulary 250 --scrape-seconds 0.01 --checks 100"


def test_it_measures_both_sides_and_the_probes(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "tiny.gguf", dtype="Q4_1", context=512).path
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.observe", str(model), *SIZES.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    ratio = re.search(r"ratio (\d+\.\d+)", done.stdout)
    assert ratio is not None, done.stdout
    assert float(ratio.group(1)) > 0
    assert "a scrape takes" in done.stdout
    figures = r"p50 [\d.]+ ms, p99 [\d.]+ ms, max [\d.]+ ms"
    checks = re.findall(rf"^(\d+) checks of the (\w+) port \((.*)\): {figures}$", done.stdout, re.M)
    assert [port for _, port, _ in checks] == ["main"] * 3 + ["health"] * 3
    assert [int(count) for count, _, _ in checks] == [100, 100, 2000] * 2
    assert ["--grpcio" in how for _, _, how in checks] == [False, True, False] * 2
    assert ["--parallel 100" in how for _, _, how in checks] == [False, False, True] * 2
