"""Tests that need an NVIDIA GPU. Asked for (`-m gpu`), they fail without one; they are never skipped."""

from __future__ import annotations

import pytest

from tokenwire import _native


@pytest.fixture(autouse=True, scope="session")
def _gpu() -> None:
    assert _native.cuda_status() == "available"
