"""Failures of the device through the whole service, injected at the backend's seam: on the CPU, so everywhere (W-44,
W-46). tests/gpu runs the same against a real device."""

from __future__ import annotations

from pathlib import Path

import pytest

from service import device_failures
from service.device_failures import Start

CASES = [
    device_failures.out_of_memory_ends_one_job,
    device_failures.out_of_memory_in_the_prefill_ends_that_job,
    device_failures.a_failed_device_ends_every_stream_and_the_process,
    device_failures.memory_elsewhere_turns_health_and_readiness_off,
    device_failures.too_little_memory_at_the_start_is_one_line,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
async def test_on_the_cpu(start: Start, tmp_path: Path, case: device_failures.Case) -> None:
    await case(start, tmp_path, "cpu")
