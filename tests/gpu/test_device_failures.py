"""Failures of a real device through the whole service: a real shortage of its memory, a kernel that traps, weights in
host memory (W-44, W-46)."""

from __future__ import annotations

from pathlib import Path

import pytest

from service import device_failures
from service.device_failures import Start
from service.test_device_failures import CASES

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
async def test_on_the_gpu(start: Start, tmp_path: Path, case: device_failures.Case) -> None:
    await case(start, tmp_path, "cuda:0")


async def test_a_device_that_is_not_there_ends_the_start(start: Start, tmp_path: Path) -> None:
    worker = await start("real", model=device_failures.tiny_model(tmp_path), device="cuda:99")
    assert await worker.exit_status() == 69
    (error,) = [line for line in worker.lines if line["level"] == "error"]
    assert error["code"] == "NO_DEVICE"
    assert "cuda:99 is not there; this machine has cuda:0" in error["message"]


async def test_auto_takes_the_gpu_and_says_so(start: Start, tmp_path: Path) -> None:
    worker = await start("real", model=device_failures.tiny_model(tmp_path), device="auto")
    line = await worker.log_line("model_load_complete")
    assert line["device"] == "cuda:0"
    assert "CUDA is usable" in line["device_reason"]
    assert line["device_name"] in line["device_reason"]
