"""TOKENWIRE_CUDA decides as documented, whatever this machine has."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
include(${DETECT})
tokenwire_detect_cuda(decision)
message(STATUS "decision=${decision}")
"""

# An empty value stands for "not found": CMake then looks no further.
NVCC = {"TOKENWIRE_NVCC": "/toolkit/bin/nvcc"}
NO_NVCC = {"TOKENWIRE_NVCC": ""}
NO_DRIVER = {"TOKENWIRE_NVIDIA_SMI": "", "TOKENWIRE_LIBCUDA": "", "TOKENWIRE_NVIDIA_DEVICE": ""}


def detect(tmp_path: Path, switch: str, **found: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "detect_test.cmake"
    script.write_text(SCRIPT)
    values = {"TOKENWIRE_CUDA": switch, "DETECT": str(ROOT / "native/cuda/detect.cmake"), **found}
    command = ["cmake", *(f"-D{name}={value}" for name, value in values.items()), "-P", str(script)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("switch", "found", "decision"),
    [
        ("OFF", {**NVCC, "TOKENWIRE_LIBCUDA": "/lib/libcuda.so.1"}, "OFF"),
        ("ON", {**NVCC, **NO_DRIVER}, "ON"),
        ("AUTO", {**NVCC, **NO_DRIVER}, "OFF"),
        ("AUTO", {**NO_NVCC, **NO_DRIVER}, "OFF"),
        ("AUTO", {**NO_NVCC, **NO_DRIVER, "TOKENWIRE_LIBCUDA": "/lib/libcuda.so.1"}, "OFF"),
        ("AUTO", {**NVCC, **NO_DRIVER, "TOKENWIRE_LIBCUDA": "/lib/libcuda.so.1"}, "ON"),
        ("AUTO", {**NVCC, **NO_DRIVER, "TOKENWIRE_NVIDIA_SMI": "/bin/nvidia-smi"}, "ON"),
        ("AUTO", {**NVCC, **NO_DRIVER, "TOKENWIRE_NVIDIA_DEVICE": "/dev/nvidiactl"}, "ON"),
    ],
)
def test_the_switch_decides_as_documented(tmp_path: Path, switch: str, found: dict[str, str], decision: str) -> None:
    result = detect(tmp_path, switch, **found)
    assert result.returncode == 0, result.stderr
    assert f"decision={decision}" in result.stdout


def test_on_without_the_compiler_names_the_remedy(tmp_path: Path) -> None:
    result = detect(tmp_path, "ON", **NO_NVCC)
    assert result.returncode != 0
    text = " ".join(result.stderr.split())  # CMake wraps its messages
    assert "Install the CUDA toolkit" in text
    assert "TOKENWIRE_CUDA=OFF" in text


def test_another_value_is_refused(tmp_path: Path) -> None:
    result = detect(tmp_path, "yes")
    assert result.returncode != 0
    assert "must be AUTO, ON or OFF" in result.stderr
