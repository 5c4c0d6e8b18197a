"""Measured figures beside what they must reach, as benchmarks/results keeps them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenwire import _native

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Target:
    """What a figure must reach and should, and the best peer's on the same machine; None for no peer."""

    must: float
    goal: float
    peer: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One figure.

    Attributes:
        value: the median of `runs`.
        prompt: tokens in each prompt, where that matters.
        ratio: ours over the peer's, so below 1 is better for times and above 1 for rates.
    """

    model: str
    format: str
    what: str
    batch: int
    prompt: int
    value: float
    unit: str
    runs: list[float]
    must: float | None = None
    goal: float | None = None
    peer: float | None = None
    ratio: float | None = None


def with_target(row: Row, target: Target | None) -> Row:
    """The row with its target's columns filled in."""
    if target is None:
        return row
    ratio = None if target.peer is None else round(row.value / target.peer, 3)
    return Row(**{**asdict(row), **asdict(target), "ratio": ratio})


def write_report(path: Path, rows: list[Row]) -> None:
    """Writes the rows with commit, device, driver and command."""
    probe = _native.cuda_probe()
    report = {
        "commit": _commit(),
        "device": [device.name for device in probe.devices],
        "driver": f"CUDA {probe.driver_version}" if probe.driver_version else "",
        "command": ["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]],
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(report, indent=1) + "\n")


def _commit() -> str:
    """The checkout's; empty where there is none."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
